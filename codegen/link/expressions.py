"""Type-checks expressions over a layout's config names and translates them to Python.

The grammar:

Names, numbers, text, `true`, `false`, `null`; `+ - * / // % **`, comparisons, `and`, `or`, `not`, `in`, `is null`;
`a if c else b`; `name[i]` for lists with one value per layer; a few functions of numbers.
"""

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import did_you_mean
from sageLLM.codegen.expr.config_text import CONSTANTS, FUNCTIONS
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.model.layout import ConfigName, ConfigType

FORMS = (ast.IfExp, ast.Subscript, ast.List)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_NUMBERS = ("int", "float")


@dataclass(frozen=True, slots=True)
class Kind:
    """The type of an expression: a config type or null, and whether the value may be null."""

    type: ConfigType | str
    is_optional: bool = False


NULL = Kind("null", True)
BOOL, INT, FLOAT = Kind("bool"), Kind("int"), Kind("float")


@dataclass(frozen=True, slots=True)
class Names:
    """The names that an expression may read: config names, and the layer index inside a layer."""

    config: Mapping[str, ConfigName]
    index: str | None = None


def compile_expression(text: Text, names: Names, non_null: frozenset[str] = frozenset()) -> ast.expr:
    """The tree of a well-typed expression; raises Refused after a finding."""
    node = parse_expression(text, FORMS)
    kind_of(node, text, names, non_null)
    return node


def kind_of(node: ast.expr, text: Text, names: Names, non_null: frozenset[str] = frozenset()) -> Kind:
    """The type of an expression; `non_null` are names known not to be null here. Raises Refused after a finding."""
    return _Typing(text, names).kind(node, non_null)


@dataclass(frozen=True, slots=True)
class _Typing:
    """Infers the types of one expression's subexpressions."""

    text: Text
    names: Names

    def kind(self, node: ast.expr, non_null: frozenset[str]) -> Kind:
        match node:
            case ast.Constant(value=bool()):
                raise self._refuse("expected a name or a constant", node, "write `true` or `false`")
            case ast.Constant(value=int() | float() | str() as value):
                return Kind(type(value).__name__)
            case ast.Name(id=name):
                return self._name(node, name, non_null)
            case ast.Subscript():
                return self._item(node)
            case ast.Call(func=ast.Name()):
                return self._call(node, non_null)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._require(operand, non_null, ("bool",), "a condition")
                return BOOL
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._require(operand, non_null, _NUMBERS, "a number")
            case ast.BoolOp():
                return self._logic(node, non_null)
            case ast.Compare():
                return self._comparison(node, non_null)
            case ast.BinOp():
                return self._arithmetic(node, non_null)
            case ast.IfExp():
                return self._choice(node, non_null)
        raise self._refuse("not supported in config expressions", node, "use names and numbers")

    def _refuse(self, message: str, node: ast.AST, help: str) -> Refused:
        return self.text.refuse("SAGE206", message, node, help)

    def _name(self, node: ast.Name, name: str, non_null: frozenset[str]) -> Kind:
        if name in CONSTANTS:
            return NULL if name == "null" else BOOL
        if name == self.names.index:
            return INT
        found = self._config_name(node)
        if found.items is not None:
            help = f"write {name}[i]" if found.items == "layers" else f"test membership: `VALUE in {name}`"
            raise self._refuse(f"expected a single value, got the list '{name}'", node, help)
        type_ = "int" if found.type == "size" else found.type
        return Kind(type_, found.is_optional and name not in non_null)

    def _config_name(self, node: ast.Name) -> ConfigName:
        if node.id not in self.names.config:
            if node.id == "i" and self.names.index is None:
                help = "the layer index is defined inside `repeat`, in blocks and in checks"
                raise self.text.refuse("SAGE205", "the layer index `i` is not defined here", node, help)
            known = [*self.names.config, *([self.names.index] if self.names.index else [])]
            raise self.text.refuse("SAGE205", f"unknown config name '{node.id}'", node, did_you_mean(node.id, known))
        return self.names.config[node.id]

    def _item(self, node: ast.Subscript) -> Kind:
        if not isinstance(node.value, ast.Name) or self._config_name(node.value).items != "layers":
            help = "declare the name with a type such as `int[L]`"
            raise self._refuse("only a list with one value per layer can be indexed", node, help)
        match node.slice:
            case ast.Name(id=name) if name == self.names.index:
                return Kind(self._config_name(node.value).type)
            case ast.Constant(value=int() as value) if not isinstance(value, bool):
                return Kind(self._config_name(node.value).type)
        help = f"write the layer index `{self.names.index}`" if self.names.index else "write a number"
        raise self._refuse("a per-layer list must be indexed by the layer or a number", node.slice, help)

    def _call(self, node: ast.Call, non_null: frozenset[str]) -> Kind:
        assert isinstance(node.func, ast.Name), "matched by the caller"
        name = node.func.id
        if name not in FUNCTIONS:
            raise self._refuse(f"unknown function '{name}'", node.func, did_you_mean(name, FUNCTIONS))
        least, most, _ = FUNCTIONS[name]
        if node.keywords or not least <= len(node.args) <= most:
            expected = f"at least {least} numbers" if most > least else f"{least} number"
            message = f"{name}: expected {expected}, got {len(node.args) + len(node.keywords)}"
            raise self._refuse(message, node, f"write {name}(a, b)" if most > 1 else f"write {name}(a)")
        kinds = [self._require(argument, non_null, _NUMBERS, "a number") for argument in node.args]
        if name in ("sqrt", "log"):
            return FLOAT
        return INT if name in ("floor", "ceil") else _wider(kinds)

    def _require(self, node: ast.expr, non_null: frozenset[str], types: Iterable[str], expected: str) -> Kind:
        kind = self.kind(node, non_null)
        if kind.type not in types:
            message = f"expected {expected}, got `{ast.unparse(node)}`: {kind.type}"
            help = "write a comparison, such as a == b" if expected == "a condition" else "use names and numbers"
            raise self._refuse(message, node, help)
        self._refuse_null(node, kind)
        return kind

    def _refuse_null(self, node: ast.expr, kind: Kind) -> None:
        if kind.is_optional:
            shown = ast.unparse(node)
            raise self._refuse(f"`{shown}` may be null here", node, f"write `... if {shown} is not null else ...`")

    def _logic(self, node: ast.BoolOp, non_null: frozenset[str]) -> Kind:
        for value in node.values:
            self._require(value, non_null, ("bool",), "a condition")
            non_null |= non_null_where(value, isinstance(node.op, ast.And))
        return BOOL

    def _comparison(self, node: ast.Compare, non_null: frozenset[str]) -> Kind:
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            match operator:
                case ast.Is() | ast.IsNot():
                    if not (isinstance(right, ast.Name) and right.id == "null"):
                        raise self._refuse("`is` must compare with null", right, "use == or != for other values")
                    self.kind(left, non_null)
                case ast.In() | ast.NotIn():
                    self._membership(left, right, non_null)
                case _:
                    self._comparable(operator, left, right, non_null)
            left = right
        return BOOL

    def _comparable(self, operator: ast.cmpop, left: ast.expr, right: ast.expr, non_null: frozenset[str]) -> None:
        kinds = [self.kind(side, non_null) for side in (left, right)]
        if NULL in kinds:
            side = (left, right)[kinds.index(NULL)]
            raise self._refuse("null must not be compared by == or <", side, "write `is null` or `is not null`")
        for side, kind in zip((left, right), kinds, strict=True):
            self._refuse_null(side, kind)
        types = {"number" if kind.type in _NUMBERS else kind.type for kind in kinds}
        if len(types) > 1:
            sides = [f"`{ast.unparse(side)}`: {kind.type}" for side, kind in zip((left, right), kinds, strict=True)]
            message = f"both sides of a comparison must have one type, got {' and '.join(sides)}"
            raise self._refuse(message, right, "write a text in quotes, a number without")
        if isinstance(operator, _ORDER) and types != {"number"}:
            message = f"`<` and `>` must compare numbers, got `{ast.unparse(right)}`: {kinds[1].type}"
            raise self._refuse(message, right, "use == or != for other values")

    def _membership(self, left: ast.expr, right: ast.expr, non_null: frozenset[str]) -> None:
        kind = self.kind(left, non_null)
        self._refuse_null(left, kind)
        match right:
            case ast.List(elts=items) if items:
                types = [self.kind(item, non_null).type for item in items]
            case ast.Name() if self._config_name(right).items is not None:
                types = [self._config_name(right).type]
            case _:
                raise self._refuse("the right side of `in` must be a list", right, "use a config list, or write [a, b]")
        if any(type_ != kind.type for type_ in types):
            message = f"expected a list of {kind.type} for `{ast.unparse(left)}`, got {types[0]}"
            raise self._refuse(message, right, "compare with values of the same type")

    def _arithmetic(self, node: ast.BinOp, non_null: frozenset[str]) -> Kind:
        if not isinstance(node.op, _ARITHMETIC):
            raise self._refuse("operator not supported in config expressions", node, "use + - * / // % **")
        kinds = [self._require(side, non_null, _NUMBERS, "a number") for side in (node.left, node.right)]
        is_division = isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod)
        if is_division and isinstance(node.right, ast.Constant) and not node.right.value:
            raise self._refuse("division by zero", node.right, "divide by a name or another number")
        return FLOAT if isinstance(node.op, ast.Div | ast.Pow) else _wider(kinds)

    def _choice(self, node: ast.IfExp, non_null: frozenset[str]) -> Kind:
        self._require(node.test, non_null, ("bool",), "a condition")
        a = self.kind(node.body, non_null | non_null_where(node.test, True))
        b = self.kind(node.orelse, non_null | non_null_where(node.test, False))
        is_optional = a.is_optional or b.is_optional
        types = {kind.type for kind in (a, b) if kind.type != "null"}
        if len(types) == 1:
            return Kind(types.pop(), is_optional)
        if types and types <= set(_NUMBERS):
            return Kind("float", is_optional)
        if not types:
            return NULL
        message = f"both branches of `if` must have one type, got {a.type} and {b.type}"
        raise self._refuse(message, node, "change one branch")


def _wider(kinds: Iterable[Kind]) -> Kind:
    return FLOAT if any(kind.type == "float" for kind in kinds) else INT


def non_null_where(test: ast.expr, is_true: bool) -> frozenset[str]:
    """The names that cannot be null where the test has this outcome."""
    match test:
        case ast.Compare(left=ast.Name(id=name), ops=[ast.IsNot() | ast.Is() as operator]):
            return frozenset({name}) if isinstance(operator, ast.IsNot) == is_true else frozenset()
        case ast.BoolOp(op=operator, values=values) if isinstance(operator, ast.And) == is_true:
            return frozenset().union(*(non_null_where(value, is_true) for value in values))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return non_null_where(operand, not is_true)
    return frozenset()


def can_fail(node: ast.expr, config: Mapping[str, ConfigName]) -> bool:
    """Whether evaluation may raise or return a non-finite number: a divisor that may be zero, roots, powers, items."""
    for inner in ast.walk(node):
        match inner:
            case ast.BinOp(op=ast.Div() | ast.FloorDiv() | ast.Mod(), right=right):
                if not _is_never_zero(right, config):
                    return True
            case ast.BinOp(op=ast.Pow()) | ast.Call(func=ast.Name(id="sqrt" | "log" | "floor" | "ceil")):
                return True
            case ast.Subscript(slice=ast.Constant()):
                return True
    return False


def _is_never_zero(node: ast.expr, config: Mapping[str, ConfigName]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in config and config[node.id].type == "size"
    return isinstance(node, ast.Constant) and bool(node.value)


def names_in(node: ast.AST, index: str | None = None) -> list[str]:
    """The config names that an expression reads, in order of first use."""
    functions = {id(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
    names = [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and id(inner) not in functions]
    return [name for name in dict.fromkeys(names) if name not in CONSTANTS and name != index]


def uses(node: ast.AST, name: str | None) -> bool:
    """Whether the expression reads the name."""
    return name is not None and any(isinstance(inner, ast.Name) and inner.id == name for inner in ast.walk(node))


def words(node: ast.expr, rename: Callable[[str], str]) -> str:
    """The expression in terms of config.json keys, for messages."""
    copied = ast.parse(ast.unparse(node), mode="eval").body
    for inner in ast.walk(copied):
        if isinstance(inner, ast.Name):
            inner.id = inner.id if inner.id in {*CONSTANTS, *FUNCTIONS} else rename(inner.id)
    return ast.unparse(copied)
