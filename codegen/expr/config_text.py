"""Config expressions of a layout as Python text."""

import ast
from collections.abc import Callable

INDEX = "i"
"""The layer index in expressions of the config section and of weights, as in tensor names."""
CONSTANTS = {"true": "True", "false": "False", "null": "None"}
FUNCTIONS: dict[str, tuple[int, int, str]] = {
    "min": (2, 8, "min"),
    "max": (2, 8, "max"),
    "abs": (1, 1, "abs"),
    "sqrt": (1, 1, "math.sqrt"),
    "log": (1, 1, "math.log"),
    "floor": (1, 1, "math.floor"),
    "ceil": (1, 1, "math.ceil"),
}
"""Name -> minimum and maximum number of arguments, and the Python function."""


def python_text(node: ast.expr, rename: Callable[[str], str] = lambda name: name) -> str:
    """The expression as Python, with its names replaced.

    Powers become `math.pow`, which is always real: `(-1) ** 0.5` would be complex, and 9 ** 9 ** 9 would not finish.
    """
    return ast.unparse(_Python(rename).visit(ast.parse(ast.unparse(node), mode="eval").body))


class _Python(ast.NodeTransformer):
    """Translates an expression of the language to Python."""

    def __init__(self, rename: Callable[[str], str]) -> None:
        self.rename = rename

    def visit_Name(self, node: ast.Name) -> ast.expr:
        text = CONSTANTS.get(node.id) or self.rename(node.id)
        return ast.parse(text, mode="eval").body

    def visit_Call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name), "the grammar has calls of names only"
        function = ast.parse(FUNCTIONS[node.func.id][2], mode="eval").body
        return ast.Call(function, [self.visit(argument) for argument in node.args], [])

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.visit(node.left), self.visit(node.right)
        if isinstance(node.op, ast.Pow):
            return ast.Call(ast.parse("math.pow", mode="eval").body, [left, right], [])
        return ast.BinOp(left, node.op, right)

    def visit_List(self, node: ast.List) -> ast.expr:
        return ast.Tuple([self.visit(item) for item in node.elts], ast.Load())
