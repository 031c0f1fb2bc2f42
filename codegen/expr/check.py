"""Type-checks expressions, with names, element types and named dims, and builds their typed trees."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.syntax import Text, check_grammar
from sageLLM.codegen.expr.tree import (
    AttrRef,
    Binary,
    BinaryOp,
    Cast,
    DimRef,
    Dot,
    Expr,
    Gather,
    IfPresent,
    Number,
    Reduce,
    ReduceOp,
    Ref,
    Select,
    Unary,
    UnaryOp,
)
from sageLLM.codegen.expr.types import DTYPES, FLOATS, INTEGERS, ValueType, size_of

UNARY = ("exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "erf", "abs", "relu", "floor", "round")
REDUCTIONS = ("sum", "mean", "amax", "amin")
FORMS = ("dot", "gather", "where", "min", "max", "optional", "present")
FUNCTIONS = (*UNARY, *REDUCTIONS, *FORMS, *DTYPES)

_OPERATORS: dict[type[ast.AST], BinaryOp] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
    ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=",
    ast.And: "and", ast.Or: "or",
}  # fmt: skip
_LITERAL_RANK = {"int": 0, "float": 1}
_SCALAR_FUNCTIONS = ("exp", "log", "sqrt", "abs", "floor", "round")


@dataclass(slots=True)
class Scope:
    """The names that an expression may use."""

    values: dict[str, ValueType] = field(default_factory=dict)
    attrs: dict[str, ValueType] = field(default_factory=dict)
    dims: Mapping[str, object] = field(default_factory=dict)
    elements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        return [*self.values, *self.attrs, *(dim for dim in self.dims if dim != "R")]

    def is_float(self, element: str) -> bool:
        return all(dtype in FLOATS for dtype in self.elements.get(element, (element,))) or element == "float"

    def is_integer(self, element: str) -> bool:
        return all(dtype in INTEGERS for dtype in self.elements.get(element, (element,))) or element == "int"


@dataclass(slots=True)
class Checker:
    """Checks one text against a scope; `present` are the optional names known to be present at this point."""

    text: Text
    scope: Scope
    present: frozenset[str] = frozenset()

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
                return self._call(node, name)
        raise self.text.refuse("SAGE102", f"`{type(node).__name__}` is not supported here", node)

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
            self._require_condition(x, node.operand)
            return Unary(x.type, "not", x)
        if not isinstance(node.op, ast.USub):
            raise self.text.refuse("SAGE102", f"`{type(node.op).__name__}` is not supported", node)
        self._require_number(x, node.operand)
        if isinstance(x, Number):
            return _number(-cast(float, x.value))
        return Unary(x.type, "neg", x)

    def _operator(self, node: ast.expr, operator: ast.operator, left: ast.expr, right: ast.expr) -> Expr:
        if type(operator) not in _OPERATORS:
            raise self.text.refuse("SAGE102", f"the operator `{type(operator).__name__}` is not supported", node)
        a, b = self._expr(left), self._expr(right)
        self._require_number(a, left)
        self._require_number(b, right)
        op = _OPERATORS[type(operator)]
        type_ = self._join(a, b, node, op)
        if op == "/" and not self.scope.is_float(type_.element):
            if not type_.is_literal:
                message = f"`/`: expected floats, got {type_.element}"
                raise self.text.refuse("SAGE107", message, node, "use `//`, or cast: f32(...)")
            type_ = ValueType("float")
        if op in ("//", "%") and not self.scope.is_integer(type_.element):
            raise self.text.refuse("SAGE107", f"`{op}`: expected integers, got {type_.element}", node)
        if op == "**" and not b.type.is_literal:
            raise self.text.refuse("SAGE107", "an exponent must be a literal or an attr", right)
        return Binary(type_, op, a, b)

    def _bool_operator(self, node: ast.BoolOp) -> Expr:
        op = _OPERATORS[type(node.op)]
        present, result = self.present, self._truth(node.values[0])
        for value in node.values[1:]:
            other = self._truth(value)
            result = Binary(self._join(result, other, node, op), op, result, other)
        self.present = present
        return result

    def _truth(self, node: ast.expr) -> Expr:
        value = self._expr(node)
        self._require_condition(value, node)
        return value

    def _comparison(self, node: ast.Compare) -> Expr:
        if len(node.ops) > 1:
            raise self.text.refuse("SAGE102", "comparisons must not be chained", node, "write `a < b and b < c`")
        if type(node.ops[0]) not in _OPERATORS:
            operator = type(node.ops[0]).__name__
            message = f"the comparison `{operator}` is not supported"
            raise self.text.refuse("SAGE102", message, node, "use == != < <= > >=")
        a, b = self._expr(node.left), self._expr(node.comparators[0])
        joined = self._join(a, b, node, _OPERATORS[type(node.ops[0])])
        element = "truth" if joined.is_literal else "bool"
        return Binary(ValueType(element, joined.dims), _OPERATORS[type(node.ops[0])], a, b)

    # common type of two operands

    def _join(self, a: Expr, b: Expr, node: ast.expr, op: str) -> ValueType:
        element = self._joined_element(a, b)
        if element is None:
            message = f"`{op}`: operands must have one element type, got {a.type.element} and {b.type.element}"
            raise self.text.refuse("SAGE107", message, node, self._cast_help(a, b))
        return ValueType(element, self._joined_dims(a.type.dims, b.type.dims, node))

    def _joined_element(self, a: Expr, b: Expr) -> str | None:
        x, y = a.type.element, b.type.element
        if x == y:
            return x
        if a.type.is_literal and b.type.is_literal:
            return max(x, y, key=_LITERAL_RANK.__getitem__) if {x, y} <= set(_LITERAL_RANK) else None
        if a.type.is_literal or b.type.is_literal:
            literal, strong = (x, y) if a.type.is_literal else (y, x)
            return strong if self._adapts(literal, strong) else None
        return None

    def _adapts(self, literal: str, strong: str) -> bool:
        if literal == "truth":
            return strong == "bool"
        return self.scope.is_float(strong) or (literal == "int" and strong != "bool" and self.scope.is_integer(strong))

    def _cast_help(self, a: Expr, b: Expr) -> str:
        names = [expr.name for expr in (b, a) if isinstance(expr, Ref) and expr.type.element != "f32"]
        return f"cast one operand: f32({names[0]})" if names else "cast one operand: f32(...)"

    def _joined_dims(self, a: tuple[Size, ...], b: tuple[Size, ...], node: ast.expr) -> tuple[Size, ...]:
        if set(b) <= set(a):
            return a
        if set(a) <= set(b):
            return b
        joined = (*a, *(dim for dim in b if dim not in a))
        if LEADING in joined[1:]:
            joined = (LEADING, *(dim for dim in joined if dim != LEADING))
        if {LEADING} < set(joined) and not (LEADING in a and LEADING in b):
            shown = " with ".join(f"[{', '.join(map(str, dims))}]" for dims in (a, b))
            help = "one operand must have all dims of the other one; name the dims of `...` one by one"
            raise self.text.refuse("SAGE113", f"cannot broadcast {shown} by name", node, help)
        return joined

    def _require_number(self, x: Expr, node: ast.expr) -> None:
        if x.type.element in ("bool", "truth", "str"):
            help = "use where(condition, 1, 0)" if x.type.element != "str" else None
            raise self.text.refuse("SAGE107", f"expected a number, got {_kind(x)}", node, help)

    def _require_condition(self, x: Expr, node: ast.expr) -> None:
        if x.type.element not in ("bool", "truth"):
            message = f"expected a condition, got {_kind(x)}"
            raise self.text.refuse("SAGE107", message, node, "write a comparison: ... > 0")

    # calls

    def _call(self, node: ast.Call, name: str) -> Expr:
        if node.keywords:
            raise self.text.refuse("SAGE106", f"{name}: keyword arguments are not supported", node.keywords[0])
        if name in self.scope.elements or name in DTYPES:
            return self._cast(node, name)
        if name in UNARY:
            return self._unary_function(node, cast(UnaryOp, name))
        if name in REDUCTIONS:
            return self._reduction(node, cast(ReduceOp, name))
        forms: dict[str, Callable[[ast.Call], Expr]] = {
            "dot": self._dot,
            "gather": self._gather,
            "where": self._where,
            "min": self._extreme,
            "max": self._extreme,
            "optional": self._optional,
            "present": self._present,
        }
        if name not in forms:
            help = did_you_mean(name, [*FUNCTIONS, *self.scope.elements]) or "known: " + ", ".join(FUNCTIONS)
            raise self.text.refuse("SAGE105", f"unknown function '{name}'", node.func, help)
        return forms[name](node)

    def _arguments(self, node: ast.Call, form: str) -> list[ast.expr]:
        count = form.count(",") + 1
        if len(node.args) != count:
            expected = f"{count} argument{'s' if count > 1 else ''}"
            raise self.text.refuse("SAGE106", f"{form}: expected {expected}, got {len(node.args)}", node)
        return node.args

    def _cast(self, node: ast.Call, element: str) -> Expr:
        (argument,) = self._arguments(node, f"{element}(v)")
        x = self._expr(argument)
        if x.type.is_literal:
            message = "a literal must not be cast; it adopts the element type of the other operand"
            raise self.text.refuse("SAGE107", message, argument, "remove the cast")
        if x.type.element == "bool" or element == "bool":
            help = "use where(condition, 1, 0)"
            raise self.text.refuse("SAGE107", "conditions and numbers must not be cast to each other", argument, help)
        return Cast(ValueType(element, x.type.dims), x)

    def _unary_function(self, node: ast.Call, name: UnaryOp) -> Expr:
        (argument,) = self._arguments(node, f"{name}(v)")
        x = self._expr(argument)
        self._require_number(x, argument)
        if x.type.is_literal:
            if name not in _SCALAR_FUNCTIONS:
                raise self.text.refuse("SAGE107", f"{name}: expected a tensor, got {_kind(x)}", argument)
            return Unary(ValueType("float"), name, x)
        if name not in ("abs", "relu") and not self.scope.is_float(x.type.element):
            message = f"{name}: expected floats, got {x.type.element}"
            raise self.text.refuse("SAGE107", message, argument, "cast it: f32(...)")
        return Unary(x.type, name, x)

    def _reduction(self, node: ast.Call, name: ReduceOp) -> Expr:
        argument, dim_node = self._arguments(node, f"{name}(v, DIM)")
        x, dim = self._expr(argument), self._dim(dim_node)
        self._require_number(x, argument)
        self._require_dim(x, dim, dim_node, name)
        if name in ("sum", "mean") and x.type.element not in ("f32", "f64", *INTEGERS):
            message = f"{name}: expected f32, f64 or integers, got {x.type.element}, which may be narrow"
            raise self.text.refuse("SAGE107", message, argument, "accumulate in f32: f32(...)")
        if name == "mean" and x.type.element in INTEGERS:
            message = f"mean: expected floats, got {x.type.element}"
            raise self.text.refuse("SAGE107", message, argument, "cast it: f32(...)")
        return Reduce(ValueType(x.type.element, _without(x.type.dims, dim)), name, x, dim)

    def _dim(self, node: ast.expr) -> Size:
        return size_of(node, self.text, self.scope.dims)

    def _require_dim(self, x: Expr, dim: Size, node: ast.expr, function: str) -> None:
        if x.type.is_literal or dim not in x.type.dims:
            dims = ", ".join(map(str, x.type.dims))
            raise self.text.refuse("SAGE108", f"{function}: expected a dim of the operand, [{dims}], got {dim}", node)

    def _dot(self, node: ast.Call) -> Expr:
        left, right, dim_node = self._arguments(node, "dot(x, w, DIM)")
        x, w, dim = self._expr(left), self._expr(right), self._dim(dim_node)
        for operand, place in ((x, left), (w, right)):
            self._require_dim(operand, dim, dim_node, "dot")
            if not self.scope.is_float(operand.type.element):
                raise self.text.refuse("SAGE107", f"dot: expected floats, got {operand.type.element}", place)
        if x.type.element != w.type.element:
            message = f"dot: operands must have one element type, got {x.type.element} and {w.type.element}"
            raise self.text.refuse("SAGE107", message, node, self._cast_help(x, w))
        if LEADING in w.type.dims and LEADING not in x.type.dims:
            raise self.text.refuse("SAGE113", "dot: only the first operand may have `...`", right, "swap the operands")
        dims = (*x.type.dims, *(other for other in w.type.dims if other not in x.type.dims))
        element = "f64" if x.type.element == "f64" else "f32"
        return Dot(ValueType(element, _without(dims, dim)), x, w, dim)

    def _gather(self, node: ast.Call) -> Expr:
        left, dim_node, right = self._arguments(node, "gather(table, DIM, index)")
        table, dim, index = self._expr(left), self._dim(dim_node), self._expr(right)
        self._require_dim(table, dim, dim_node, "gather")
        if index.type.element not in ("i32", "i64"):
            raise self.text.refuse("SAGE107", f"gather: expected an index of i32 or i64, got {_kind(index)}", right)
        rest = _without(table.type.dims, dim)
        if set(rest) & set(index.type.dims) or LEADING in (*rest, *index.type.dims):
            message = "gather: table and index must not share dims or have `...`"
            raise self.text.refuse("SAGE113", message, node)
        at = table.type.dims.index(dim)
        dims = (*table.type.dims[:at], *index.type.dims, *table.type.dims[at + 1 :])
        return Gather(ValueType(table.type.element, dims), table, dim, index)

    def _where(self, node: ast.Call) -> Expr:
        arguments = self._arguments(node, "where(condition, a, b)")
        condition, a, b = self._truth(arguments[0]), self._expr(arguments[1]), self._expr(arguments[2])
        joined = self._join(a, b, node, "and")
        if joined.is_literal and not condition.type.is_literal:
            message = "where: at least one value must be a tensor, because it determines the element type"
            raise self.text.refuse("SAGE107", message, node)
        return Select(
            ValueType(joined.element, self._joined_dims(condition.type.dims, joined.dims, node)), condition, a, b
        )

    def _extreme(self, node: ast.Call) -> Expr:
        op = cast(BinaryOp, cast(ast.Name, node.func).id)
        left, right = self._arguments(node, f"{op}(a, b)")
        a, b = self._expr(left), self._expr(right)
        self._require_number(a, left)
        self._require_number(b, right)
        return Binary(self._join(a, b, node, op), op, a, b)

    def _optional(self, node: ast.Call) -> Expr:
        name_node, with_node, without_node = self._arguments(node, "optional(name, with, without)")
        name = self._optional_name(name_node)
        outer = self.present
        self.present = outer | {name}
        a = self._expr(with_node)
        self.present = outer
        b = self._expr(without_node)
        element = self._joined_element(a, b) or (
            "bool" if {a.type.element, b.type.element} == {"bool", "truth"} else None
        )
        both_literal = a.type.is_literal and b.type.is_literal
        if element is None or (a.type.dims != b.type.dims and not (both_literal or element == "bool")):
            message = f"optional: both values must have one type, got {a.type} with '{name}' and {b.type} without"
            raise self.text.refuse("SAGE107", message, node)
        return IfPresent(ValueType(element, a.type.dims or b.type.dims), name, a, b)

    def _present(self, node: ast.Call) -> Expr:
        (argument,) = self._arguments(node, "present(name)")
        name = self._optional_name(argument)
        yes, no = (Number(ValueType("truth"), value) for value in (True, False))
        return IfPresent(ValueType("truth"), name, yes, no)

    def _optional_name(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name) or node.id not in self.scope.optional:
            help = (
                did_you_mean(getattr(node, "id", ""), self.scope.optional)
                or "declare an input or attr with `optional: true`"
            )
            raise self.text.refuse("SAGE131", "expected an optional input or attr", node, help)
        return node.id


def _number(value: object) -> Number:
    if isinstance(value, str):
        return Number(ValueType("str"), value)
    if isinstance(value, bool):
        return Number(ValueType("truth"), value)
    number = cast(float, value)
    return Number(ValueType("float" if isinstance(value, float) else "int"), number)


def _kind(x: Expr) -> str:
    words = {"truth": "a condition", "bool": "a condition", "int": "an integer", "float": "a number", "str": "text"}
    return words.get(x.type.element, str(x.type))


def _without(dims: tuple[Size, ...], dim: Size) -> tuple[Size, ...]:
    return tuple(other for other in dims if other != dim)
