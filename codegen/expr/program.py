"""Checks a `compute` block: views, assignments, and that every output is written exactly once."""

import ast
import builtins
import keyword
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.functions import FUNCTIONS
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.size import LEADING, Size, volume
from sageLLM.codegen.expr.syntax import Refused, Text, check_grammar, parse_statements
from sageLLM.codegen.expr.tree import Expr, Number, Program, Slice, Statement, View, names_read
from sageLLM.codegen.expr.types import DIM_NAME, ValueType, parse_dim, split_dims

_PYTHON = frozenset([*keyword.kwlist, *dir(builtins)]) - {"input", "sum", "min", "max", "abs", "pow", "round"}
_KERNEL = frozenset({"torch", "math", "wide", "triton", "tl", "device", "tile"})
_NODE = frozenset(
    {"attr_types", "attrs", "block", "byte_formula", "bytes_moved", "copy", "dependencies", "device_id", "dims"}
    | {"estimated_time_us", "flop_formula", "flops", "infer", "inference", "inplace", "input", "input_types", "inputs"}
    | {"kind", "layer_id", "memory_bytes", "metadata", "node_id", "op", "op_type", "operands", "optional_input"}
    | {"optional_inputs", "origins", "output", "output_types", "outputs", "problems", "resolve", "self", "spec"}
    | {"stream_id", "tags", "verify", "where"} | {"cls", "g", "name", "names"}
)  # fmt: skip
RESERVED = _PYTHON | _KERNEL
RESERVED_FOR_OPERANDS = RESERVED | _NODE
"""Names that generated code uses itself: keywords, builtins, modules; for operands also members of nodes."""


def parse_view(
    text: Text,
    name: str,
    operands: Mapping[str, ValueType],
    dims: Mapping[str, object],
    known: Collection[Size] = (),
) -> View:
    """`gu[T, 0:I]`, `x[T, 1:D:2]` or `x[T, N, D] as [T, N*D]`; raises Refused otherwise.

    `known` are sizes that the op's conditions guarantee to be non-negative: D - Dr, for `where: [Dr <= D]`.
    """
    base, inside, shape_text = _view_parts(text)
    if base.value not in operands:
        raise base.refuse("SAGE117", f"unknown operand '{base.value}'", None, did_you_mean(base.value, operands))
    base_type = operands[base.value]
    parts = split_dims(inside)
    if len(parts) != len(base_type.dims):
        message = f"a view must name the {len(base_type.dims)} dims of '{base.value}': {base_type}, got {len(parts)}"
        raise text.refuse("SAGE117", message, None)
    slices = tuple(_slice(part, dim, dims, known) for part, dim in zip(parts, base_type.dims, strict=True))
    sliced = tuple(part.length if part else dim for part, dim in zip(slices, base_type.dims, strict=True))
    shape = tuple(parse_dim(part, dims) for part in split_dims(shape_text)) if shape_text else None
    if shape is not None and volume(shape) != volume(sliced):
        shapes = " and ".join(f"[{', '.join(map(str, dims))}]" for dims in (sliced, shape))
        raise text.refuse("SAGE117", f"a reshape must keep the number of elements, got {shapes}")
    return View(
        name, base.value, base_type, slices, shape, ValueType(base_type.element, sliced if shape is None else shape)
    )


def _view_parts(text: Text) -> tuple[Text, Text, Text | None]:
    value = text.value
    opening, closing = value.find("["), value.find("]")
    rest = value[closing + 1 :].strip()
    is_reshaped = rest.startswith("as ") and rest.endswith("]") and rest[3:].lstrip().startswith("[")
    if opening < 1 or closing < opening or (rest and not is_reshaped):
        help = 'write for example "x[T, 0:I]" or "x[T, N, D] as [T, N*D]"'
        raise text.refuse("SAGE117", f"expected a view, got '{value}'", None, help)
    shape = text.part(value.index("[", closing) + 1, value.rindex("]")) if rest else None
    return text.part(0, len(value[:opening].rstrip())), text.part(opening + 1, closing), shape


def _slice(part: Text, dim: Size, dims: Mapping[str, object], known: Collection[Size]) -> Slice | None:
    if ":" not in part.value:
        if parse_dim(part, dims) != dim:
            message = f"expected the dim {dim} of the operand or a slice of it, got {part.value}"
            raise part.refuse("SAGE117", message, None, f"write {dim}, or a:b")
        return None
    cuts = [-1, *(i for i, letter in enumerate(part.value) if letter == ":"), len(part.value)]
    start, stop, *steps = (parse_dim(_trimmed(part, a + 1, b), dims) for a, b in pairwise(cuts))
    ends = (start, dim - stop, stop - start if not steps else Size.of(0))
    inside = all(_is_never_negative(size, known) for size in ends)
    if not inside or dim == LEADING:
        message = f"the slice {part.value} must be inside the dim {dim}"
        raise part.refuse("SAGE117", message, None, f"required: 0 <= start <= stop <= {dim}")
    return Slice(start, stop, _step(part, start, steps)) if steps else Slice(start, stop)


def _is_never_negative(size: Size, known: Collection[Size]) -> bool:
    return size.is_never_negative or any((size - other).is_never_negative for other in known)


def _step(part: Text, start: Size, steps: Sequence[Size]) -> int:
    step, first = steps[0].constant, start.constant
    if len(steps) != 1 or step is None or step < 2 or first is None or first >= step:
        message = f"a slice with a step must be a:b:step with numbers a < step, got {part.value}"
        raise part.refuse("SAGE117", message)
    return step


def _trimmed(text: Text, start: int, end: int) -> Text:
    raw = text.value[start:end]
    return text.part(start + len(raw) - len(raw.lstrip()), end - (len(raw) - len(raw.rstrip())))


@dataclass(slots=True)
class ProgramChecker:
    """Checks the statements of one `compute` in order; a refused statement does not hide findings in the others."""

    text: Text
    scope: Scope
    inputs: Mapping[str, ValueType]
    outputs: Mapping[str, ValueType]
    views: Sequence[View]
    statements: list[Statement] = field(default_factory=list)
    written: dict[str, ast.AST] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)  # targets of refused statements: no findings about them
    sites: dict[str, ast.AST] = field(default_factory=dict)

    def check(self) -> Program | None:
        before = len(self.text.sink.diagnostics)
        try:
            body = parse_statements(self.text)
        except Refused:
            return None
        for statement in body:
            self._statement(statement)
        if not self.unknown:
            self._check_outputs()
            self._check_uses()
        if len(self.text.sink.diagnostics) > before:
            return None
        return Program(tuple(self.views), tuple(self.statements))

    def _statement(self, node: ast.stmt) -> None:
        target = "?"
        try:
            check_grammar(self.text, node)
            name = self._target(node)
            target = name.id
            if isinstance(node, ast.Assign):
                self._assign(name, node.value)
        except Refused:
            self.unknown.add(target)

    def _target(self, node: ast.stmt) -> ast.Name:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            raise self.text.refuse("SAGE102", "a line must have the form `name = expression`", node)
        return node.targets[0]

    def _assign(self, name: ast.Name, value: ast.expr) -> None:
        destination = self._destination(name)
        if self.unknown & {inner.id for inner in ast.walk(value) if isinstance(inner, ast.Name)}:
            self.unknown.add(name.id)  # the cause is reported already
            return
        result = Checker(self.text, self.scope).expression(value)
        self._check_value(name, value, result, destination)
        self.statements.append(Statement(name.id, result))
        self.scope.values[name.id] = destination or result.type
        self.sites[name.id] = name

    def _destination(self, name: ast.Name) -> ValueType | None:
        """The declared type of an output or of a view of one; None for a new name."""
        target = name.id
        view = next((view for view in self.views if view.name == target), None)
        if target in self.inputs or (view and view.base in self.inputs):
            raise self.text.refuse("SAGE112", f"the input '{target}' must not be assigned", name, "choose a new name")
        if target in self.written:
            help = "every name is assigned once; choose a new name"
            raise self.text.refuse("SAGE111", f"'{target}' is already defined", name, help)
        self.written[target] = name
        if target in self.outputs:
            return self.outputs[target]
        if view:
            return view.type
        self._check_new_name(name)
        return None

    def _check_new_name(self, name: ast.Name) -> None:
        if why := why_not_a_value_name(name.id, self.scope):
            raise self.text.refuse("SAGE116", why, name, "choose another name")

    def _check_value(self, name: ast.Name, node: ast.expr, result: Expr, declared: ValueType | None) -> None:
        if declared is None:
            if result.type.is_literal:
                message = f"the value of '{name.id}' must be a tensor, got {result.type}"
                raise self.text.refuse("SAGE107", message, node, "write the expression where it is used")
            return
        if set(result.type.dims) != set(declared.dims) and not (isinstance(result, Number)):
            dims = f"[{', '.join(map(str, result.type.dims))}]"
            raise self.text.refuse("SAGE109", f"'{name.id}': expected {declared}, got the dims {dims}", node)
        if result.type.element != declared.element:
            message = f"'{name.id}': expected the element type {declared.element}, got {result.type.element}"
            raise self.text.refuse("SAGE109", message, node, f"cast the value: {declared.element}(...)")

    def _check_outputs(self) -> None:
        for name in self.outputs:
            parts = [view for view in self.views if view.base == name and view.name in self.written]
            if name in self.written and parts:
                message = f"the output '{name}' must be assigned whole or by views, got both: '{parts[0].name}'"
                self.text.sink.error("SAGE111", message, self.text.span(self.written[parts[0].name]))
            elif name not in self.written and not parts:
                message, help = f"the output '{name}' is never assigned", f"add `{name} = ...`"
                self.text.sink.error("SAGE110", message, self.text.span(), help)
            elif parts and not tiles(parts, self.outputs[name]):
                names = ", ".join(view.name for view in parts)
                message = f"the assigned views must cover the output '{name}' exactly once, got {names}"
                self.text.sink.error("SAGE110", message, self.text.span(self.written[parts[0].name]))

    def _check_uses(self) -> None:
        used = {name for statement in self.statements for name in names_read(statement.value)}
        views = {view.name for view in self.views}
        for name, site in self.sites.items():
            if name not in used and name not in self.outputs and name not in views:
                self.text.sink.error("SAGE127", f"'{name}' is never used", self.text.span(site), "remove the line")


def tiles(parts: Sequence[View], whole: ValueType) -> bool:
    """Whether the views, all sliced along the same dim (or a single whole view), cover the tensor exactly once."""
    cut = tile_axis(parts)
    if cut is None:
        return len(parts) == 1 and not any(parts[0].slices)
    at = Size.of(0)
    for group in grouped_parts(parts, cut):
        found = [part.slices[cut] for part in group]
        first = found[0]
        starts = [one.start for one in found if one is not None]
        if first is None or starts != [at + Size.of(i) for i in range(first.step)]:
            return False
        at = first.stop
    return at == whole.dims[cut]


def tile_axis(parts: Sequence[View]) -> int | None:
    """The one dim along which the views are slices, or None."""
    cuts = {axis for part in parts for axis, cut in enumerate(part.slices) if cut is not None}
    return cuts.pop() if len(cuts) == 1 else None


def grouped_parts(parts: Sequence[View], axis: int) -> list[list[View]]:
    """The views in order along the axis, each starting where another one stops; those with a step form one group."""
    groups: dict[Size, list[View]] = {}
    stops: dict[Size, Size] = {}
    for part in parts:
        cut = part.slices[axis]
        assert cut is not None, "every part must be sliced along the axis"
        start = Size.of(0) if cut.step > 1 else cut.start
        groups.setdefault(start, []).append(part)
        stops[start] = cut.stop
    ordered, at = [], Size.of(0)
    while at in groups:
        ordered.append(sorted(groups.pop(at), key=lambda part: _offset(part, axis)))
        at = stops[at]
    return ordered if not groups else [[part] for part in parts]


def _offset(part: View, axis: int) -> int:
    cut = part.slices[axis]
    return (cut.start.constant or 0) if cut is not None and cut.step > 1 else 0


def why_not_a_value_name(name: str, scope: Scope, reserved: frozenset[str] = RESERVED) -> str | None:
    """Why a value must not have this name, or None."""
    if name in FUNCTIONS or name in scope.elements or name in ("true", "false"):
        return f"'{name}' is a keyword of the compute language"
    if name in scope.dims or DIM_NAME.match(name):
        return f"the name of a value must begin with a lower-case letter, got '{name}'"
    if name in scope.values or name in scope.attrs:
        return f"'{name}' is already defined as an operand, view or attr"
    if name.startswith("_") or name in reserved:
        return f"'{name}' is reserved for generated code"
    return None


def with_view_types(scope: Scope, inputs: Mapping[str, ValueType], views: Sequence[View]) -> Scope:
    """The scope extended by the views of inputs; views of outputs are added when they are assigned."""
    return replace(scope, values=scope.values | {view.name: view.type for view in views if view.base in inputs})
