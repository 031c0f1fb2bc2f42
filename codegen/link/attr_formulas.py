"""Links formulas of attrs, `Na=3*Q` in a line of `fuses` and `factor=f*g` in the replacement of a rule.

A formula has names of attrs, numbers, and + - * / // %; divisors are numbers other than 0, so it never fails.
"""

import ast
from collections.abc import Mapping

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.expr.types import ValueType, size_of
from sageLLM.codegen.model.op import Attr, AttrFormula

_NUMBERS = {"f32": "float", "i32": "int", "dim": "int"}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult)
_DIVISIONS = (ast.Div, ast.FloorDiv, ast.Mod)


def is_formula(node: ast.expr) -> bool:
    """Whether the value of an attr is computed."""
    return isinstance(node, ast.BinOp | ast.UnaryOp)


def link_formula(text: Text, node: ast.expr, attrs: Mapping[str, Attr], declared: Attr, code: str) -> AttrFormula:
    """The formula of an attr; raises Refused after a finding."""
    linker = _Linker(text, attrs, code)
    kind = linker.kind(node)
    if declared.type not in _NUMBERS:
        raise linker.refuse(f"'{declared.name}' is {declared.type}, which is not computed", node, "pass a name")
    if kind == "float" and declared.type != "f32":
        message = f"{declared.name}: expected an integer, got a formula of floats"
        raise linker.refuse(message, node, "use integers, and // to divide")
    names = tuple(dict.fromkeys(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)))
    is_dim = declared.type == "dim"
    if others := [name for name in names if (attrs[name].type == "dim") != is_dim]:
        expected = "dims" if is_dim else "numbers that are not dims"
        raise linker.refuse(f"{declared.name} must be computed from {expected}, got '{others[0]}'", node, "pass a name")
    if is_dim:
        size = size_of(node, text, dict.fromkeys(names))
        return AttrFormula(ast.unparse(node), names, size=size)
    scope = Scope(attrs={name: ValueType(_NUMBERS[attrs[name].type]) for name in names})
    return AttrFormula(ast.unparse(node), names, value=Checker(text, scope).expression(node))


def how_to_define(name: str, attrs: Mapping[str, Attr]) -> str:
    """The remedy for an unknown attr. The size of an operand can be computed with when it is an attr too."""
    is_dim = name[0].isupper()
    return f"add `{name}: {{type: dim}}` to `attrs`" if is_dim else did_you_mean(name, attrs) or "define the attr"


class _Linker:
    """Checks the nodes of one formula."""

    def __init__(self, text: Text, attrs: Mapping[str, Attr], code: str) -> None:
        self.text, self.attrs, self.code = text, attrs, code

    def refuse(self, message: str, node: ast.AST, help: str) -> Refused:
        return self.text.refuse(self.code, message, node, help)

    def kind(self, node: ast.expr) -> str:
        """`int` or `float`; raises Refused for anything else."""
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return type(value).__name__
            case ast.Name(id=name):
                return self._attr(name, node)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.kind(operand)
            case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, (*_OPERATORS, *_DIVISIONS)):
                kinds = {self.kind(left), self.kind(right)}
                if isinstance(operator, _DIVISIONS) and not (isinstance(right, ast.Constant) and right.value):
                    raise self.refuse("a divisor must be a number other than 0", right, "multiply, or pass the result")
                return "float" if isinstance(operator, ast.Div) or "float" in kinds else "int"
        raise self.refuse("not supported in the formula of an attr", node, "use attrs, numbers and + - * / // %")

    def _attr(self, name: str, node: ast.Name) -> str:
        attr = self.attrs.get(name)
        if attr is None:
            raise self.refuse(f"unknown attr '{name}'", node, how_to_define(name, self.attrs))
        if attr.type not in _NUMBERS:
            raise self.refuse(f"'{name}' is {attr.type}, expected a number", node, "pass it on its own")
        if attr.optional:
            raise self.refuse(f"'{name}' may be absent", node, "pass it on its own, or make it required")
        return _NUMBERS[attr.type]
