"""Links the expressions of formats: each node has a kind and dims, by which operands are matched."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.syntax import Text, parse_expression
from sageLLM.codegen.model.format import (
    INTEGERS,
    Binary,
    Bits,
    Concat,
    Constant,
    Extent,
    Kind,
    Lookup,
    Named,
    PowerOfTwo,
    Repeat,
    Stored,
    StoredLookup,
    StoredTensor,
    Take,
    Value,
)

FUNCTIONS = {
    "bits": "bits(words, width, dim), with an order or a run as fourth argument",
    "rep": "rep(x, count, dim)",
    "lut": "lut(codes, TABLE), of a constant table or a stored one",
    "e8m0": "e8m0(bytes)",
    "take": "take(x, index, dim)",
    "cat": "cat(a, b, dim)",
}
"""Functions of the language, with their arguments."""
_OPERATORS: Mapping[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
}  # fmt: skip


@dataclass(slots=True)
class Scope:
    """The names that an expression may use, and the order of dims."""

    tensors: Mapping[str, StoredTensor]
    sizes: Mapping[str, str | int]
    tables: Mapping[str, Sequence[int | float]]
    dims: tuple[str, ...]
    let: dict[str, Value] = field(default_factory=dict)


def link_value(text: Text, scope: Scope) -> Value:
    """The tree of an expression; raises Refused after reporting a finding."""
    return _Linker(text, scope).value(parse_expression(text))


@dataclass(slots=True)
class _Linker:
    text: Text
    scope: Scope

    def value(self, node: ast.expr) -> Value:
        match node:
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return Constant("int" if isinstance(number, int) else "float", (), str(number))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self._binary(node, _OPERATORS[type(op)], self.value(left), self.value(right))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return self._call(node, name, args)
        known = ", ".join(FUNCTIONS.values())
        raise self._refuse(node, f"`{ast.unparse(node)}` is not supported", f"use + - * / // % ** and {known}")

    def _name(self, node: ast.expr, name: str) -> Value:
        if name in self.scope.let:
            found = self.scope.let[name]
            return Named(found.kind, found.dims, name)
        if name in self.scope.tensors:
            tensor = self.scope.tensors[name]
            kind: Kind = "int" if tensor.element in INTEGERS else "float"
            return Stored(kind, self._in_order(tensor.dims), name)
        if name in self.scope.sizes:
            return Constant("int", (), name)
        known = [*self.scope.tensors, *self.scope.let, *self.scope.sizes]
        raise self._refuse(node, f"unknown name '{name}'", did_you_mean(name, known))

    def _binary(self, node: ast.expr, op: str, a: Value, b: Value) -> Value:
        extents = {extent.dim: extent for extent in a.dims}
        for extent in b.dims:
            other = extents.setdefault(extent.dim, extent)
            if other != extent:
                help = f"repeat the elements of the smaller one: rep(x, G, {extent.dim})"
                raise self._refuse(node, f"the operands have different sizes, {other} and {extent}", help)
        if op in ("//", "%", "**") and "float" in (a.kind, b.kind):
            raise self._refuse(node, f"the operands of `{op}` must be integers", "use it on codes, not on scales")
        if op == "**" and not (isinstance(a, Constant) and a.text == "2"):
            raise self._refuse(node, "the base of `**` must be 2", "write 2 ** b")
        kind: Kind = "float" if "float" in (a.kind, b.kind) or op == "/" else "int"
        return Binary(kind, self._in_order(extents.values()), op, a, b)

    def _call(self, node: ast.Call, name: str, args: Sequence[ast.expr]) -> Value:
        counts = {"bits": (3, 4), "rep": (3,), "lut": (2,), "e8m0": (1,), "take": (3,), "cat": (3,)}
        if len(args) not in counts[name]:
            raise self._refuse(node, f"wrong number of arguments of '{name}'", f"write {FUNCTIONS[name]}")
        x = self.value(args[0])
        match name:
            case "bits":
                return self._bits(node, x, args)
            case "rep":
                count, dim = self._size(args[1]), self._dim(args[2], x)
                number, powers = _scale(count)
                return Repeat(x.kind, self._rescaled(x, dim, number, powers), x, count, dim)
            case "lut":
                return self._lookup(self._integer(args[0], x), args[1])
            case "e8m0":
                return PowerOfTwo("float", x.dims, self._integer(args[0], x))
            case "take":
                return self._take(node, x, self._integer(args[1], self.value(args[1])), self._dim(args[2], x))
        return self._concat(node, x, self.value(args[1]), self._dim(args[2], x))

    def _lookup(self, x: Value, node: ast.expr) -> Value:
        if not (isinstance(node, ast.Name) and node.id in self.scope.tensors):
            return Lookup("float", x.dims, x, self._table(node))
        table = self.value(node)
        if table.kind != "float" or len(table.dims) != 1:
            raise self._refuse(node, "a stored table must have floats and one dim", "store it as f32[T]")
        return StoredLookup("float", x.dims, x, table)

    def _bits(self, node: ast.Call, x: Value, args: Sequence[ast.expr]) -> Value:
        if not isinstance(x, Stored) or x.kind != "int":
            raise self._refuse(args[0], "`bits` requires a stored tensor of integers", "store it as u8 or i32")
        width, dim = self._size(args[1]), self._dim(args[2], x)
        word = INTEGERS[self.scope.tensors[x.name].element]
        number, powers = _scale(width)
        if not powers and word % number:
            raise self._refuse(args[1], f"the width must divide the {word} bits of a word", "use 1, 2, 4, 8 or 16")
        order, run = None, 1
        match args[3:]:
            case [ast.Constant(value=int(found))] if found > 0:
                run = found
            case [ast.Name() as name]:
                order = self._table(name)
            case [other]:
                raise self._refuse(other, "expected a table with an order, or a run", f"write {FUNCTIONS['bits']}")
        dims = self._rescaled(x, dim, Fraction(word) / number, {one: -power for one, power in powers.items()})
        return Bits("int", dims, x, width, dim, order, run)

    def _take(self, node: ast.Call, x: Value, index: Value, dim: str) -> Value:
        if len(index.dims) != 1:
            raise self._refuse(node, "the positions must have one dim", "use a stored tensor such as i32[K]")
        [extent] = index.dims
        if extent.dim != dim:
            raise self._refuse(node, f"the positions must be along {dim}, got {extent}", f"write {FUNCTIONS['take']}")
        dims = tuple(extent if one.dim == dim else one for one in x.dims)
        return Take(x.kind, dims, x, index, dim)

    def _concat(self, node: ast.Call, a: Value, b: Value, dim: str) -> Value:
        others = [[extent for extent in one.dims if extent.dim != dim] for one in (a, b)]
        sizes = [extent for one in (a, b) for extent in one.dims if extent.dim == dim]
        if others[0] != others[1] or len(sizes) != 2 or sizes[0].powers != sizes[1].powers:
            raise self._refuse(node, f"the operands must have equal dims besides {dim}", f"write {FUNCTIONS['cat']}")
        total = Extent(dim, sizes[0].factor + sizes[1].factor, sizes[0].powers)
        kind: Kind = "float" if "float" in (a.kind, b.kind) else "int"
        return Concat(kind, tuple(total if one.dim == dim else one for one in a.dims), a, b, dim)

    def _rescaled(self, x: Value, dim: str, number: Fraction | int, powers: Mapping[str, int]) -> tuple[Extent, ...]:
        return tuple(one.scaled(Fraction(number), powers) if one.dim == dim else one for one in x.dims)

    def _in_order(self, extents: Iterable[Extent]) -> tuple[Extent, ...]:
        return tuple(sorted(extents, key=lambda extent: self.scope.dims.index(extent.dim)))

    def _integer(self, node: ast.expr, value: Value) -> Value:
        if value.kind != "int":
            raise self._refuse(node, "expected integers, got floats", "use a stored tensor of integers, or bits(...)")
        return value

    def _size(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int(number)) if number > 0:
                return str(number)
            case ast.Name(id=name) if name in self.scope.sizes:
                return name
        help = did_you_mean(ast.unparse(node), self.scope.sizes)
        raise self._refuse(node, f"expected a number or a size, got '{ast.unparse(node)}'", help)

    def _dim(self, node: ast.expr, x: Value) -> str:
        names = [extent.dim for extent in x.dims]
        if isinstance(node, ast.Name) and node.id in names:
            return node.id
        raise self._refuse(node, f"expected a dim of the value, got '{ast.unparse(node)}'", did_you_mean("", names))

    def _table(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name) and node.id in self.scope.tables:
            return node.id
        shown = ast.unparse(node)
        raise self._refuse(node, f"unknown table '{shown}'", did_you_mean(shown, self.scope.tables))

    def _refuse(self, node: ast.AST, message: str, help: str) -> Exception:
        return self.text.refuse("SAGE602", message, node, help)


def _scale(size: str) -> tuple[int, dict[str, int]]:
    """A number or a size as a factor: (4, {}) or (1, {"G": 1})."""
    return (int(size), {}) if size.isdigit() else (1, {size: 1})
