"""Links a layout's config section: names with types, defaults and checks as Python text that was built, not pasted."""

import ast
import keyword
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.link.flatten import FlatModel, Placed
from sageLLM.codegen.model.layout import Check, ConfigName, ConfigType
from sageLLM.codegen.schema.models import ConfigField, Scalar

REQUIRED_NAMES = ("H", "L", "Nq", "Nkv", "D", "V", "max_position")
_RESERVED = frozenset(
    {
        *("tp", "rank", "rope", "alibi", "hf", "cls", "self", "true", "false", "from_hf"),
        *("replace", "divided", "read_rope"),
        *("int", "float", "bool", "str", "range", "tuple", "list"),
    }
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}\Z")
_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_PYTHON: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def link_config(flat: FlatModel, sizes: set[str], taken: Iterable[str], sink: Sink) -> dict[str, ConfigName]:
    """The config names in order. `sizes` are those that shapes use; `taken` are names with another meaning."""
    linked: dict[str, ConfigName] = {}
    dims = set(taken)
    for name, field in flat.config.items():
        if not _NAME.match(name) or keyword.iskeyword(name) or name in _RESERVED | dims:
            help = "use letters, digits and `_`; the dims of a step and Python's words are taken"
            sink.error("SAGE204", f"'{name}' cannot name a config value", field.key_span(), help)
            continue
        try:
            found = _link_field(name, field, linked, sink)
        except Refused:
            found = ConfigName(name, (), field.value.type or "int", False, None, None, "")
        is_size = name in sizes and found.type == "int" and not found.is_optional
        linked[name] = replace(found, type="size") if is_size else found
    for name in REQUIRED_NAMES:
        if name not in flat.config:
            sink.error(
                "SAGE207", f"the config has no '{name}', which the runtime reads", flat.span, "add it to `config`"
            )
    return linked


def check_own_names_are_read(flat: FlatModel, words: Iterable[str], sink: Sink) -> None:
    """A name that a layout adds to its parent's must be among `words`, the names that the whole layout reads.

    Otherwise a misspelt name would be a new one, and the parent's would silently stay as it is.
    """
    if flat.base is None:
        return
    inherited = flat.base.spec.config
    known = {*inherited, *words, *REQUIRED_NAMES}
    for name in (name for name in flat.entry.spec.config if name not in known):
        message = f"the config name '{name}' is neither inherited from '{flat.base.name}' nor read by anything"
        sink.error("SAGE208", message, flat.config[name].key_span(), did_you_mean(name, inherited))


def link_checks(flat: FlatModel, config: Mapping[str, ConfigName], sink: Sink) -> list[Check]:
    """The conditions, each also in words of config.json. A name that may be null is checked where it is not."""
    checks: list[Check] = []
    for place in flat.checks:
        try:
            node = compile_expression(place.text(place.value, sink), config)
        except Refused:
            continue
        if not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
            sink.error("SAGE206", f"'{place.value}' is not a condition", place.span(), "compare, e.g. `Nq % Nkv == 0`")
            continue
        names = tuple(config[name] for name in names_in(node))
        optional = [name for name in names if name.is_optional]
        if any(not name.keys for name in optional):
            continue  # fixed to null, so there is nothing to check
        words = render(node, lambda name: config[name].words)
        nulls = "".join(f"{name.name} is None or " for name in optional)
        checks.append(Check(nulls + render(node), words, names))
    return checks


def _link_field(name: str, place: Placed[ConfigField], known: Mapping[str, ConfigName], sink: Sink) -> ConfigName:
    field = place.value
    keys = (field.hf,) if isinstance(field.hf, str) else tuple(field.hf or ())
    for key in keys:
        if not _KEY.match(key):
            sink.error("SAGE206", f"'{key}' is not a key of config.json", place.span("hf"), "write key or outer.key")
            raise Refused
    doc = field.doc or (f"HF {keys[0]}" if keys else "fixed by the family")
    origin = "value" if not keys else "default"
    given: Scalar = field.value if not keys else field.default
    is_given = origin in field.model_fields_set
    if not is_given:
        return ConfigName(name, keys, field.type or "int", False, None, None, doc)
    if given is None and field.type not in (None, "int", "float"):
        sink.error("SAGE206", f"a {field.type} cannot be null", place.span(origin), "give a default that is not null")
        raise Refused
    if given is None:
        return ConfigName(name, keys, field.type or "int", True, "None", None, doc)
    if isinstance(given, str) and field.type != "str":
        node = compile_expression(place.text(given, sink, origin), known)
        type_ = _refined(type_of(node, known), field, place, origin, sink)
        return ConfigName(name, keys, type_, False, render(node), None, doc)
    type_ = _refined(_type_of_value(given), field, place, origin, sink)
    text = repr(float(given)) if type_ == "float" else repr(given)
    return ConfigName(name, keys, type_, False, text, given, doc)


def _refined(found: ConfigType, field: ConfigField, place: Placed[ConfigField], origin: str, sink: Sink) -> ConfigType:
    wanted = field.type or found
    if wanted != found and not (wanted == "float" and found == "int"):
        sink.error(
            "SAGE206", f"the {origin} is {found}, but the type is {wanted}", place.span(origin), "make them agree"
        )
        raise Refused
    return wanted


def _type_of_value(value: Scalar) -> ConfigType:
    kinds: tuple[ConfigType, ...] = ("bool", "int", "float", "str")
    return next(kind for kind in kinds if isinstance(value, _PYTHON[kind]))


def compile_expression(text: Text, known: Mapping[str, ConfigName]) -> ast.expr:
    """An expression of config names: arithmetic, comparison, `and`, `or`, `not`; raises Refused for anything else."""
    node = parse_expression(text)
    for inner in ast.walk(node):
        _check_node(inner, text, known)
    return node


def _check_node(node: ast.AST, text: Text, known: Mapping[str, ConfigName]) -> None:
    match node:
        case ast.Name(id="true" | "false"):
            return
        case ast.Name(id=name) if name not in known:
            raise text.refuse("SAGE205", f"unknown config name '{name}'", node, did_you_mean(name, known))
        case ast.BinOp(op=operator, right=right):
            if not isinstance(operator, _ARITHMETIC):
                raise text.refuse(
                    "SAGE206", "this operator is not part of config expressions", node, "use + - * / // %"
                )
            if isinstance(operator, ast.Div | ast.FloorDiv | ast.Mod) and not _is_never_zero(right):
                raise text.refuse("SAGE206", "the divisor could be zero", right, "divide by a name or a number")
        case ast.Constant(value=bool() | int() | float() | str()) | ast.Name() | ast.UnaryOp(op=ast.USub() | ast.Not()):
            return
        case ast.Compare(ops=ops) if all(isinstance(op, ast.In | ast.NotIn | ast.Is | ast.IsNot) for op in ops):
            raise text.refuse("SAGE206", "compare with == != < <= > >=", node)
        case ast.BoolOp() | ast.Compare() | ast.operator() | ast.unaryop() | ast.boolop() | ast.cmpop() | ast.Load():
            return
        case ast.expr():
            raise text.refuse("SAGE206", "this is not part of config expressions", node, "use names and numbers")


def _is_never_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Constant) and node.value not in (0, "", False))


def type_of(node: ast.expr, known: Mapping[str, ConfigName]) -> ConfigType:
    """The type that an expression has."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return _type_of_value(value)
        case ast.Name(id="true" | "false") | ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
            return "bool"
        case ast.Name(id=name):
            return "int" if known[name].type == "size" else known[name].type
        case ast.BinOp(op=ast.Div()):
            return "float"
        case ast.BinOp(left=left, right=right):
            return "float" if "float" in (type_of(left, known), type_of(right, known)) else "int"
        case ast.UnaryOp(operand=operand):
            return type_of(operand, known)
    raise AssertionError(f"{type(node).__name__} passed the grammar of config expressions")


def names_in(node: ast.AST) -> list[str]:
    """The config names that an expression reads, in the order of their first use."""
    names = [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    return [name for name in dict.fromkeys(names) if name not in ("true", "false")]


def render(node: ast.expr, rename: Callable[[str], str] = lambda name: name) -> str:
    """The expression as Python text, with its names replaced."""
    copied = ast.parse(ast.unparse(node), mode="eval").body
    for inner in ast.walk(copied):
        if isinstance(inner, ast.Name):
            inner.id = {"true": "True", "false": "False"}.get(inner.id) or rename(inner.id)
    return ast.unparse(copied)
