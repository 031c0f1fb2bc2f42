"""Links format files: names and dims are resolved, and the values of weights become typed trees."""

import ast
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.types import split_dims
from sageLLM.codegen.link.format_values import Scope, link_value
from sageLLM.codegen.link.gguf import check_architectures, check_incomplete, check_recipes
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.format import (
    ELEMENTS,
    Extent,
    FormatDef,
    MethodDef,
    Stored,
    StoredTensor,
    Value,
    key_of_state,
    walk,
)
from sageLLM.codegen.model.format_blocks import block_stores_of
from sageLLM.codegen.model.format_stores import stores_of
from sageLLM.codegen.names import why_not_a_function
from sageLLM.codegen.schema.formats import FormatsFile, FormatSpec

BYTES = {"u8": 1, "i8": 1, "f8": 1, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8}
NO_STATE = "add `state: [NAME]`, a tensor with JSON"
BLOCK_LEN = "B"
"""The size with the number of elements of a block."""
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


def link_methods(raw: Mapping[str, Entry[FormatsFile]], sink: Sink) -> dict[str, MethodDef]:
    """All methods; findings are reported."""
    return {name: method for name, entry in raw.items() if (method := link_method(entry, sink)) is not None}


def link_method(entry: Entry[FormatsFile], sink: Sink) -> MethodDef | None:
    """One method, or None after reporting its findings."""
    is_correct = not [one for one in (check_architectures, check_recipes, check_incomplete) if not one(entry, sink)]
    formats = [_FormatLinker(entry, name, spec, sink).linked() for name, spec in entry.spec.formats.items()]
    return (
        None
        if not is_correct or any(one is None for one in formats)
        else MethodDef(entry, tuple(one for one in formats if one))
    )


class _FormatLinker:
    """Links one format."""

    def __init__(self, entry: Entry[FormatsFile], name: str, spec: FormatSpec, sink: Sink) -> None:
        self.entry, self.name, self.spec, self.sink = entry, name, spec, sink
        self.path = ("formats", name)

    def linked(self) -> FormatDef | None:
        try:
            return self._linked()
        except Refused:
            return None

    def _linked(self) -> FormatDef:
        self._check_names()
        self._check_state()
        weight = self._weight_dims()
        names = self.spec.block or self.spec.tensors
        if bool(self.spec.block) == bool(self.spec.tensors):
            raise self._refuse("a format must have either `tensors` or a `block`", (), "list the stored tensors")
        if self.spec.block and weight != ("N", "K"):
            raise self._refuse("a weight of blocks must be [N, K]", ("weight",), "remove `weight`")
        tensors = [self._tensor(name, weight) for name in names]
        dims = tuple(dict.fromkeys([extent.dim for one in tensors for extent in one.dims]))
        scope = Scope({one.name: one for one in tensors}, self.spec.sizes, self.spec.tables, dims)
        for name in self.spec.let:
            scope.let[name] = link_value(self._text("let", name), scope)
        value = link_value(self._text("value"), scope)
        self._check_value(value, weight, scope)
        size = self._block_bytes(tensors) if self.spec.block else None
        found = FormatDef(self.name, self.spec, weight, dims, tuple(tensors), dict(scope.let), value, size)
        if self.spec.write:
            self._check_written(found)
        return found

    def _check_written(self, found: FormatDef) -> None:
        """Written formats have a value with an inverse, and schemes that select the format by its settings."""
        stores = stores_of(found) if found.block_bytes is None else block_stores_of(found)
        if stores is None and found.block_bytes is not None:
            message = "written blocks must have codes * scales, with minima or offsets if any, made of fields of bits"
            raise self._refuse(message, ("write",), "remove `write`, or write the value in this form")
        if stores is None:
            message = "a written value must be (codes - zeros) * scales of stored tensors, each of which is a part"
            raise self._refuse(message, ("write",), "remove `write`, or write the value in this form")
        keys = {key for key in self.spec.sizes.values() if isinstance(key, str)}
        for name, settings in self.spec.write.items():
            for key, value in settings.items():
                known = found.when.get(key, ())
                if value not in known and not any(one == key or one.startswith(f"{key}.") for one in keys):
                    message = f"the scheme '{name}' sets '{key}' to {value!r}, which is not a value of the format"
                    names = ", ".join(sorted({*found.when, *keys}))
                    raise self._refuse(message, ("write", name, key), f"use a value of `when`, or a key of {names}")
            holes = set(re.findall(r"\{(\w*)\}", name))
            if not holes <= self.spec.sizes.keys():
                message = f"the name '{name}' has {{{min(holes - self.spec.sizes.keys())}}}, which is not a size"
                raise self._refuse_key(message, ("write", name), did_you_mean("", self.spec.sizes))

    def _check_names(self) -> None:
        if why := why_not_a_function(self.name):
            raise self._refuse_key(f"the format name '{self.name}' cannot be used: {why}", (), "rename it")
        for kind in ("tensors", "block", "let", "tables", "sizes"):
            for name in getattr(self.spec, kind):
                is_word = _NAME.match(name) if kind in ("tensors", "block", "let") else name.isidentifier()
                if not is_word or name == "of":
                    message = f"'{name}' cannot be the name of a value: generated code has a variable of the name"
                    raise self._refuse_key(message, (kind, name), "use lower-case letters, digits and `_`")

    def _check_state(self) -> None:
        """Names in files are those of tensors, and what comes from the state needs one."""
        for kind in ("stored", "nested"):
            for name in getattr(self.spec, kind):
                if name not in self.spec.tensors:
                    help = did_you_mean(name, self.spec.tensors)
                    raise self._refuse_key(f"'{name}' is not a tensor of the format", (kind, name), help)
        for name, size in self.spec.sizes.items():
            if key_of_state(size) and not self.spec.state:
                raise self._refuse("expected a format with `state`", ("sizes", name), NO_STATE)
        for name, one in self.spec.nested.items():
            if not self.spec.state:
                raise self._refuse("expected a format with `state`", ("nested", name), NO_STATE)
            for key in ("block", "offset"):
                if not key_of_state(getattr(one, key)):
                    raise self._refuse("expected a key of the state", ("nested", name, key), "write state.KEY")

    def _weight_dims(self) -> tuple[str, ...]:
        text = self._text("weight")
        found = re.fullmatch(r"\[([A-Z](?:, [A-Z])*)\]", text.value)
        names = tuple(found[1].split(", ")) if found else ()
        if len(names) not in (2, 3) or not {"N", "K"} <= set(names):
            raise text.refuse("SAGE601", "expected the dims of a weight", None, "write [N, K] or [E, N, K]")
        return names

    def _tensor(self, name: str, weight: tuple[str, ...]) -> StoredTensor:
        """`i32[K/8, N]`, or `f32[1]` for a number; a field has the dims [N, K/B] of the blocks before its own."""
        kind = "block" if self.spec.block else "tensors"
        text = self._text(kind, name)
        found = re.fullmatch(r"(\w+)(?:\[([^\[\]]*)\])?", text.value)
        if not found or found[1] not in ELEMENTS:
            help = did_you_mean(found[1] if found else "", ELEMENTS)
            raise text.refuse("SAGE601", f"expected an element type and dims, got '{text.value}'", None, help)
        known = {*weight, *self.spec.sizes}
        inner = text.part(found.start(2), found.end(2)) if found[2] is not None else text.part(0, 0)
        dims = () if inner.value == "1" else tuple(self._extent(part, known) for part in split_dims(inner))
        if self.spec.block:
            dims = (Extent("N"), Extent("K", Fraction(1), ((BLOCK_LEN, -1),)), *dims)
        if len({extent.dim for extent in dims}) < len(dims):
            raise text.refuse("SAGE601", "a dim must appear only once in a tensor", None, "use two names")
        return StoredTensor(name, found[1], dims)

    def _extent(self, text: Text, known: set[str]) -> Extent:
        tree = parse_expression(text)
        factor, powers, dim = Fraction(1), dict[str, int](), ""
        for node, power in _factors(tree, 1):
            match node:
                case ast.Constant(value=int(number)) if number > 0:
                    factor *= Fraction(number) ** power
                case ast.Name(id=name) if name in known and not dim and power == 1:
                    dim = name
                case ast.Name(id=name) if name in self.spec.sizes:
                    powers[name] = powers.get(name, 0) + power
                case _:
                    shown = ast.unparse(node)
                    help = f"use {', '.join(sorted(known))}, numbers, * and /"
                    raise text.refuse("SAGE601", f"'{shown}' cannot be a part of a dim", node, help)
        if not dim:
            raise text.refuse("SAGE601", "a dim must begin with its name", None, "write K/8 or B/2")
        return Extent(dim).scaled(factor, powers)

    def _check_value(self, value: Value, weight: tuple[str, ...], scope: Scope) -> None:
        text = self._text("value")
        shown = ", ".join(map(str, value.dims))
        by_dim = {extent.dim: extent for extent in value.dims}
        inner = by_dim.pop(BLOCK_LEN, None) if BLOCK_LEN not in weight else None
        is_in_blocks = inner is not None or (bool(self.spec.block) and self.spec.sizes.get(BLOCK_LEN) == 1)
        outer = Extent("K", Fraction(1), ((BLOCK_LEN, -1),)) if is_in_blocks else Extent("K")
        expected = {name: outer if name == "K" else Extent(name) for name in weight}
        if by_dim != expected or (inner is not None and not inner.is_whole):
            dims = ", ".join(weight)
            help = "repeat elements with rep(x, G, K), or take fields with bits(x, 4, K)"
            raise text.refuse("SAGE602", f"the value must have the dims [{dims}], got [{shown}]", None, help)
        used = {node.name for root in (*scope.let.values(), value) for node in walk(root) if isinstance(node, Stored)}
        for name in scope.tensors:
            if name not in used:
                kind = "block" if self.spec.block else "tensors"
                message = f"the value does not use the tensor '{name}'"
                raise self._refuse_key(message, (kind, name), "list it under `unused`, or use it")

    def _block_bytes(self, tensors: Sequence[StoredTensor]) -> int:
        """The bytes of a block, whose length must be a number."""
        length = self.spec.sizes.get(BLOCK_LEN)
        if not isinstance(length, int):
            raise self._refuse("the size B of a block must be a number", ("sizes",), "add `sizes: {B: 32}`")
        return sum(field_bytes(one, length) for one in tensors)

    def _text(self, *path: str) -> Text:
        value: Any = self.spec
        for step in path:
            value = value[step] if isinstance(value, dict) else getattr(value, step)
        return Text.of(value, self.entry, (*self.path, *path), self.sink)

    def _refuse(self, message: str, path: tuple[str, ...], help: str) -> Refused:
        self.sink.error("SAGE601", message, self.entry.span(*self.path, *path), help)
        return Refused(message)

    def _refuse_key(self, message: str, path: tuple[str, ...], help: str) -> Refused:
        self.sink.error("SAGE603", message, self.entry.key_span(*self.path, *path), help)
        return Refused(message)


def field_bytes(field: StoredTensor, block_len: int) -> int:
    """The bytes of a field in a block."""
    count = Fraction(1)
    for extent in field.dims[2:]:
        count *= block_len * extent.factor
    return BYTES[field.element] * int(count)


def _factors(node: ast.expr, power: int) -> list[tuple[ast.expr, int]]:
    """The factors of a product or quotient, with 1 or -1 as their powers."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*_factors(node.left, power), *_factors(node.right, power)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return [*_factors(node.left, power), *_factors(node.right, -power)]
    return [(node, power)]
