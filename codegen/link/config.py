"""Links a layout's config section: names with types, defaults and checks as Python text that was built, not pasted."""

import ast
import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.syntax import Refused
from sageLLM.codegen.link.expressions import (
    Names,
    can_fail,
    compile_expression,
    kind_of,
    names_in,
    python_text,
    uses,
    words,
)
from sageLLM.codegen.link.flatten import FlatModel, Placed
from sageLLM.codegen.model.layout import Check, ConfigName, ConfigType, ListKind
from sageLLM.codegen.schema.models import ConfigField, Scalar

REQUIRED_NAMES = ("H", "L", "Nq", "Nkv", "D", "V", "max_position")
_RESERVED = frozenset(
    {
        *("tp", "rank", "rope", "alibi", "hf", "cls", "self", "true", "false", "from_hf"),
        *("replace", "divided", "read_rope"),
        *("int", "float", "bool", "str", "range", "tuple", "list", "math", "null", "i"),
        *("min", "max", "abs", "sqrt", "log", "floor", "ceil", "all", "computed", "computed_in_layer"),
    }
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}\Z")
_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")
INDEX = "i"
"""The number of the layer, in expressions of the config section and of weights, as in tensor names."""
_PYTHON: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def link_config(flat: FlatModel, sizes: set[str], taken: Iterable[str], sink: Sink) -> dict[str, ConfigName]:
    """The config names in order. `sizes` are those that shapes use; `taken` are names with another meaning."""
    linked: dict[str, ConfigName] = {}
    dims = set(taken)
    for name, field in flat.config.items():
        if not _NAME.match(name) or keyword.iskeyword(name) or name in _RESERVED | dims:
            is_taken = _NAME.match(name) is not None
            help = "it has another meaning; choose another name" if is_taken else "use letters, digits and `_`"
            sink.error("SAGE204", f"'{name}' cannot name a config value", field.key_span(), help)
            continue
        try:
            found = _link_field(name, field, linked, sink)
        except Refused:
            declared, items = _declared(field.value)
            found = ConfigName(name, (), declared or "int", False, None, None, "", items)
        is_size = name in sizes and found.type == "int" and not found.is_optional and found.items is None
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
    """The conditions, each also in words of config.json. A name that may be null is checked where it is not.

    A condition on the layer's number `i` is one for every layer.
    """
    checks = [_link_check(place, config, sink) for place in flat.checks]
    return [check for check in checks if check is not None]


def _link_check(place: Placed[str], config: Mapping[str, ConfigName], sink: Sink) -> Check | None:
    text, names = place.text(place.value, sink), Names(config, INDEX)
    nullable = frozenset(name for name, found in config.items() if found.is_optional)
    try:
        node = compile_expression(text, names, nullable)
    except Refused:
        return None
    if kind_of(node, text, names, nullable).type != "bool":
        sink.error("SAGE206", f"'{place.value}' is not a condition", place.span(), "compare, e.g. `Nq % Nkv == 0`")
        return None
    read = tuple(config[name] for name in names_in(node, INDEX))
    guarded = [name for name in read if name.is_optional and name.name not in _asked_for_null(node)]
    if any(not name.keys and name.default == "None" for name in guarded):
        return None  # fixed to null, so there is nothing to check
    nulls = "".join(f"{name.name} is None or " for name in guarded)
    condition, rule = (
        nulls + python_text(node),
        words(node, lambda name: config[name].words if name in config else name),
    )
    if uses(node, INDEX):
        condition, rule = f"all({condition} for {INDEX} in hf.layers(L))", f"{rule} for every layer {INDEX}"
    formula = place.value if can_fail(node, config) else ""
    return Check(condition, rule, read, formula)


def _asked_for_null(node: ast.expr) -> set[str]:
    """The names that the condition itself compares with null."""
    tests = [inner for inner in ast.walk(node) if isinstance(inner, ast.Compare)]
    asked = [test.left for test in tests if isinstance(test.ops[0], ast.Is | ast.IsNot)]
    return {name.id for name in asked if isinstance(name, ast.Name)}


def _link_field(name: str, place: Placed[ConfigField], known: Mapping[str, ConfigName], sink: Sink) -> ConfigName:
    field = place.value
    keys = (field.hf,) if isinstance(field.hf, str) else tuple(field.hf or ())
    for key in keys:
        if not _KEY.match(key):
            sink.error("SAGE206", f"'{key}' is not a key of config.json", place.span("hf"), "write key or outer.key")
            raise Refused
    doc = field.doc or (f"HF {keys[0]}" if keys else "fixed by the family")
    origin = "value" if not keys else "default"
    given = field.value if not keys else field.default
    type_, items = _declared(field)
    if items is not None:
        return _link_list(name, place, known, sink, doc)
    if isinstance(given, list):
        sink.error("SAGE206", f"the {origin} is a list", place.span(origin), "declare `type: int[]` or `type: int[L]`")
        raise Refused
    if origin not in field.model_fields_set:
        return ConfigName(name, keys, type_ or "int", False, None, None, doc)
    if given is None and type_ not in (None, "int", "float"):
        sink.error("SAGE206", f"a {type_} cannot be null", place.span(origin), "give a default that is not null")
        raise Refused
    if given is None:
        return ConfigName(name, keys, type_ or "int", True, "None", None, doc)
    if isinstance(given, str) and type_ != "str":
        text = place.text(given, sink, origin)
        node = compile_expression(text, Names(known))
        kind = kind_of(node, text, Names(known))
        if kind.type == "null":
            raise text.refuse("SAGE206", f"the {origin} is always null", None, "write `null` without quotes")
        refined = _refined(cast(ConfigType, kind.type), type_, place, origin, sink)
        if kind.is_optional and refined not in ("int", "float"):
            raise text.refuse("SAGE206", f"a {refined} cannot be null", None, "give another value in place of null")
        formula = given if can_fail(node, known) or refined == "float" else ""
        return ConfigName(name, keys, refined, kind.is_optional, python_text(node), None, doc, None, formula)
    refined = _refined(_type_of_value(given), type_, place, origin, sink)
    literal = repr(float(given)) if refined == "float" else repr(given)
    return ConfigName(name, keys, refined, False, literal, given, doc)


def _declared(field: ConfigField) -> tuple[ConfigType | None, ListKind | None]:
    """The type of one item, and of what the name is a list, if it is one."""
    if field.type is None or "[" not in field.type:
        return cast(ConfigType | None, field.type), None
    base, _, length = field.type.rstrip("]").partition("[")
    return cast(ConfigType, base), "layers" if length else "list"


def _link_list(
    name: str, place: Placed[ConfigField], known: Mapping[str, ConfigName], sink: Sink, doc: str
) -> ConfigName:
    """A list: one value per layer, whose default may be an expression of the layer's number, or of any length."""
    field = place.value
    type_, items = _declared(field)
    keys = (field.hf,) if isinstance(field.hf, str) else tuple(field.hf or ())
    origin = "value" if not keys else "default"
    given = field.value if not keys else field.default
    found = ConfigName(name, keys, type_ or "int", False, None, None, doc, items)
    if items == "layers" and "L" not in known:
        sink.error(
            "SAGE206",
            f"'{name}' has one value per layer, but L is not known yet",
            place.key_span(),
            "declare L before it",
        )
        raise Refused
    if origin not in field.model_fields_set:
        return found
    if isinstance(given, list):
        for item in given:
            if isinstance(item, bool) != (type_ == "bool") or not isinstance(item, _PYTHON[str(type_)]):
                sink.error("SAGE206", f"'{item}' is no {type_}", place.span(origin), "let all items have the type")
                raise Refused
        return replace(found, default=repr(tuple(given)))
    if items == "list" or not isinstance(given, str):
        help = "write a list, or an expression of `i`, the layer" if items == "layers" else "write a list, e.g. []"
        sink.error("SAGE206", f"the {origin} of '{name}' is no list", place.span(origin), help)
        raise Refused
    text, names = place.text(given, sink, origin), Names(known, INDEX)
    node = compile_expression(text, names)
    kind = kind_of(node, text, names)
    if kind.is_optional:
        raise text.refuse("SAGE206", "an item of a list cannot be null", None, "give a value, e.g. 0 or -1")
    _refined(cast(ConfigType, kind.type), type_, place, origin, sink)
    return replace(found, default=python_text(node), formula=given)


def _refined(
    found: ConfigType, declared: ConfigType | None, place: Placed[ConfigField], origin: str, sink: Sink
) -> ConfigType:
    wanted = declared or found
    if wanted != found and not (wanted == "float" and found == "int"):
        sink.error(
            "SAGE206", f"the {origin} is {found}, but the type is {wanted}", place.span(origin), "make them agree"
        )
        raise Refused
    return wanted


def _type_of_value(value: Scalar) -> ConfigType:
    kinds: tuple[ConfigType, ...] = ("bool", "int", "float", "str")
    return next(kind for kind in kinds if isinstance(value, _PYTHON[kind]))
