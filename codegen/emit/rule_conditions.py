"""Writes the conditions of rewrite rules as Python over the variables of the generated function."""

import ast
from collections.abc import Iterator, Mapping

_OF_VALUE = {"bytes": "{}.num_bytes", "rank": "len({}.shape)", "dtype": "{}.dtype", "size": "size_of({}, {})"}


def required_sizes(node: ast.expr) -> Iterator[tuple[str, int | None]]:
    """The sizes that a condition reads: value and dim, or None for all dims."""
    for call in ast.walk(node):
        match call:
            case ast.Call(func=ast.Name(id="bytes"), args=[ast.Name(id=value)]):
                yield value, None
            case ast.Call(func=ast.Name(id="size"), args=[ast.Name(id=value), ast.Constant(value=int() as index)]):
                yield value, index


def condition_text(node: ast.expr, values: Mapping[str, str], attrs: Mapping[str, str]) -> str:
    """`all_reduce.x.num_bytes <= 512 * 1024`, from the texts of values and attrs by name."""
    return ast.unparse(_Substitution(values, attrs).visit(ast.parse(ast.unparse(node), mode="eval").body))


def negated(node: ast.expr) -> ast.expr:
    """The negated condition."""
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return inner
        case ast.Compare(left=a, ops=[ast.Eq()], comparators=others):
            return ast.Compare(a, [ast.NotEq()], others)
        case ast.Compare(left=a, ops=[ast.NotEq()], comparators=others):
            return ast.Compare(a, [ast.Eq()], others)
    return ast.UnaryOp(ast.Not(), node)


class _Substitution(ast.NodeTransformer):
    """Replaces the name of a value or attr by its text."""

    def __init__(self, values: Mapping[str, str], attrs: Mapping[str, str]) -> None:
        self.values, self.attrs = values, attrs

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _parsed(self.attrs[node.id])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name), "the linker accepts only named functions"
        value, *index = [ast.unparse(arg) for arg in node.args]
        return _parsed(_OF_VALUE[node.func.id].format(self.values[value], *index))


def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
