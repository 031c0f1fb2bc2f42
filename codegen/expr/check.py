"""Type-checks expressions, with names, element types and named dims, and builds their typed trees."""

import ast
from dataclasses import dataclass, field
from typing import cast

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.constants import constant
from sageLLM.codegen.expr.functions import FunctionChecker
from sageLLM.codegen.expr.operand_types import OperandTypes
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.syntax import Text, check_grammar
from sageLLM.codegen.expr.tree import AttrRef, Binary, BinaryOp, DimRef, Expr, Number, Ref, Unary
from sageLLM.codegen.expr.types import ValueType

_OPERATORS: dict[type[ast.AST], BinaryOp] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.And: "and", ast.Or: "or",
}  # fmt: skip


@dataclass(slots=True)
class Checker:
    """Checks one text against a scope; `present` are the optional names known to be present at this point."""

    text: Text
    scope: Scope
    present: frozenset[str] = frozenset()
    types: OperandTypes = field(init=False)
    functions: FunctionChecker = field(init=False)

    def __post_init__(self) -> None:
        self.types = OperandTypes(self.text, self.scope)
        self.functions = FunctionChecker(self.text, self.scope, self.types, self._expr, self._expr_with)

    def expression(self, node: ast.expr) -> Expr:
        """The typed tree of `node`; raises Refused after a finding."""
        check_grammar(self.text, node)
        return self._expr(node)

    def _expr(self, node: ast.expr) -> Expr:
        match node:
            case ast.Constant(value=value):
                return _number(value)
            case ast.Name():
                return self._name(node)
            case ast.UnaryOp():
                return self._unary_operator(node)
            case ast.BinOp(left=left, op=operator, right=right):
                return self._operator(node, operator, left, right)
            case ast.BoolOp():
                return self._bool_operator(node)
            case ast.Compare():
                return self._comparison(node)
            case ast.Call(func=ast.Name(id=name)):
                return self.functions.call(node, name)
        help = "use names, numbers, arithmetic, comparisons and calls of functions"
        raise self.text.refuse("SAGE102", f"`{type(node).__name__}` is not supported here", node, help)

    def _expr_with(self, node: ast.expr, name: str) -> Expr:
        """The tree of an expression that is evaluated only if the optional name is present."""
        outer, self.present = self.present, self.present | {name}
        value = self._expr(node)
        self.present = outer
        return value

    # names

    def _name(self, node: ast.Name) -> Expr:
        name, scope = node.id, self.scope
        if name in ("true", "false"):
            return Number(ValueType("truth"), name == "true")
        if name in scope.optional and name not in self.present:
            help = f"write optional({name}, value_if_present, value_if_absent)"
            raise self.text.refuse("SAGE131", f"'{name}' may be absent", node, help)
        if name in scope.values:
            return Ref(scope.values[name], name)
        if name in scope.attrs:
            return AttrRef(scope.attrs[name], name)
        if name in scope.dims and name != "R":
            return DimRef(ValueType("int"), Size.symbol(name))
        raise self.text.refuse("SAGE104", f"unknown name '{name}'", node, did_you_mean(name, scope.names))

    # operators

    def _unary_operator(self, node: ast.UnaryOp) -> Expr:
        x = self._expr(node.operand)
        if isinstance(node.op, ast.Not):
            self.types.require_condition(x, node.operand)
            return Unary(x.type, "not", x)
        if not isinstance(node.op, ast.USub):
            raise self.text.refuse("SAGE102", f"`{type(node.op).__name__}` is not supported", node, "use - or not")
        self.types.require_number(x, node.operand)
        if isinstance(x, Number):
            return _number(-cast(float, x.value))
        return Unary(x.type, "neg", x)

    def _operator(self, node: ast.expr, operator: ast.operator, left: ast.expr, right: ast.expr) -> Expr:
        if type(operator) not in _OPERATORS:
            message = f"the operator `{type(operator).__name__}` is not supported"
            raise self.text.refuse("SAGE102", message, node, "use + - * / // % **; a matrix product is dot(x, w, K)")
        a, b = self._expr(left), self._expr(right)
        self.types.require_number(a, left)
        self.types.require_number(b, right)
        op = _OPERATORS[type(operator)]
        type_ = self.types.join(a, b, node, op)
        if op == "/" and not self.scope.is_float(type_.element):
            if not type_.is_literal:
                message = f"`/`: expected floats, got {type_.element}"
                raise self.text.refuse("SAGE107", message, node, "use `//`, or cast: f32(...)")
            type_ = ValueType("float")
        if op in ("//", "%") and not self.scope.is_integer(type_.element):
            message = f"`{op}`: expected integers, got {type_.element}"
            raise self.text.refuse("SAGE107", message, node, "write floor(a / b)")
        if op in ("/", "//", "%") and constant(right) == 0:
            raise self.text.refuse("SAGE103", "division by zero", right, "divide by a name or another number")
        if op == "**" and not b.type.is_literal:
            help = "write exp(b * log(a))"
            raise self.text.refuse("SAGE107", "an exponent must be a literal or an attr", right, help)
        return Binary(type_, op, a, b)

    def _bool_operator(self, node: ast.BoolOp) -> Expr:
        op = _OPERATORS[type(node.op)]
        result = self._condition(node.values[0])
        for value in node.values[1:]:
            other = self._condition(value)
            result = Binary(self.types.join(result, other, node, op), op, result, other)
        return result

    def _condition(self, node: ast.expr) -> Expr:
        value = self._expr(node)
        self.types.require_condition(value, node)
        return value

    def _comparison(self, node: ast.Compare) -> Expr:
        if len(node.ops) > 1:
            raise self.text.refuse("SAGE102", "comparisons must not be chained", node, "write `a < b and b < c`")
        if type(node.ops[0]) not in _OPERATORS:
            operator = type(node.ops[0]).__name__
            message = f"the comparison `{operator}` is not supported"
            raise self.text.refuse("SAGE102", message, node, "use == != < <= > >=")
        a, b = self._expr(node.left), self._expr(node.comparators[0])
        joined = self.types.join(a, b, node, _OPERATORS[type(node.ops[0])])
        element = "truth" if joined.is_literal else "bool"
        return Binary(ValueType(element, joined.dims), _OPERATORS[type(node.ops[0])], a, b)


def _number(value: object) -> Number:
    if isinstance(value, str):
        return Number(ValueType("str"), value)
    if isinstance(value, bool):
        return Number(ValueType("truth"), value)
    number = cast(float, value)
    return Number(ValueType("float" if isinstance(value, float) else "int"), number)
