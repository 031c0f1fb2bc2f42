"""Links a layout's config section: names with types, defaults and checks.

Defaults and checks become Python text unparsed from a checked tree, so no text of a spec reaches generated code.
"""

import ast
import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.config_text import INDEX, python_text
from sageLLM.codegen.expr.syntax import Refused
from sageLLM.codegen.link.conditions import config_may_hold
from sageLLM.codegen.link.expressions import (
    Names,
    can_fail,
    compile_expression,
    kind_of,
    names_in,
    uses,
    words,
)
from sageLLM.codegen.link.flat_layout import FlatModel, Located
from sageLLM.codegen.model.layout import Check, ConfigName, ConfigType, ListKind
from sageLLM.codegen.schema.models import ConfigField, Scalar, in_order

REQUIRED_NAMES = ("H", "L", "Nq", "Nkv", "D", "V", "max_position")
_RESERVED = frozenset(
    {"tp", "rank", "rope", "alibi", "hf", "cls", "self", "from_hf", "replace", "divided", "read_rope"}
    | {"int", "float", "bool", "str", "range", "tuple", "list", "math", "all", "computed", "computed_in_layer"}
    | {"min", "max", "abs", "sqrt", "log", "floor", "ceil", "true", "false", "null", "i"}
)  # fmt: skip
"""Names of the generated config class and of `from_hf`, and words of expressions."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}\Z")
CONFIG_KEY = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")
_PYTHON: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def link_config(flat: FlatModel, sizes: set[str], taken: Iterable[str], sink: Sink) -> dict[str, ConfigName]:
    """The config names in order. `sizes` are those that shapes use; `taken` are names reserved for dims of the step."""
    linked: dict[str, ConfigName] = {}
    dims = set(taken)
    for name, field in flat.config.items():
        if not _NAME.match(name) or keyword.iskeyword(name) or name in _RESERVED | dims:
            is_reserved = _NAME.match(name) is not None
            help = "choose another name" if is_reserved else "use letters, digits and `_`, at most 32 characters"
            message = f"the name '{name}' is reserved" if is_reserved else f"expected a config name, got '{name}'"
            sink.error("SAGE204", message, field.key_span(), help)
            continue
        try:
            found = _link_field(name, field, linked, sink)
        except Refused:
            declared, items = _declared(field.value)
            found = ConfigName(name, (), declared or "int", False, None, None, "", items)
        is_size = name in sizes and found.type == "int" and not found.is_optional and found.items is None
        linked[name] = replace(found, type="size") if is_size else found
        if flat.entry.spec.hf.root is None and any(key.startswith("/") for key in found.keys):
            help = "remove the `/`, or add `root` to `hf`, the section with the keys of the text model"
            sink.error("SAGE206", "a key outside the section `root` requires one", field.span("hf"), help)
    for name in REQUIRED_NAMES:
        if name not in flat.config:
            message = f"`config` must define '{name}', which the runtime reads"
            sink.error("SAGE207", message, flat.span, f"add `{name}` to `config`")
    return linked


def check_own_names_are_read(flat: FlatModel, words: Iterable[str], sink: Sink) -> None:
    """Reports config names that a layout adds to its parent's but that are not in `words`, the names it reads.

    Such a name is most likely misspelt, and the parent's name would silently keep its value.
    """
    if flat.base is None:
        return
    inherited = flat.inherited
    known = {*inherited, *words, *REQUIRED_NAMES}
    for name in (name for name in flat.entry.spec.config if name not in known):
        message = f"the config name '{name}' is unused and not inherited from '{flat.base.name}'"
        sink.error("SAGE208", message, flat.config[name].key_span(), did_you_mean(name, inherited))


def link_checks(flat: FlatModel, config: Mapping[str, ConfigName], sink: Sink) -> list[Check]:
    """The conditions, each also in terms of config.json keys. A condition on a name that is null holds.

    A condition on the layer index `i` must hold for every layer.
    """
    checks = [_link_check(located, config, sink) for located in flat.checks]
    return [check for check in checks if check is not None]


def _link_check(located: Located[str], config: Mapping[str, ConfigName], sink: Sink) -> Check | None:
    text, names = located.text(located.value, sink), Names(config, INDEX)
    nullable = frozenset(name for name, found in config.items() if found.is_optional)
    try:
        node = compile_expression(text, names, nullable)
    except Refused:
        return None
    if kind_of(node, text, names, nullable).type != "bool":
        message = f"expected a condition, got '{located.value}'"
        sink.error("SAGE206", message, located.span(), "write a comparison, e.g. `Nq % Nkv == 0`")
        return None
    read = tuple(config[name] for name in names_in(node, INDEX))
    guarded = [name for name in read if name.is_optional and name.name not in _compared_with_null(node)]
    if any(not name.keys and name.default == "None" for name in guarded):
        return None  # the name is fixed to null, so the condition always holds
    nulls = "".join(f"{name.name} is None or " for name in guarded)
    if not config_may_hold(node, config, INDEX, has_fixed=True):
        message = f"no config satisfies `{located.value}`"
        sink.error("SAGE233", message, located.span(), "correct the check, or remove it: `drop: {checks: [...]}`")
        return None
    condition, rule = (
        nulls + python_text(node),
        words(node, lambda name: config[name].words if name in config else name),
    )
    if uses(node, INDEX):
        condition, rule = f"all({condition} for {INDEX} in hf.layers(L))", f"{rule} for every layer {INDEX}"
    formula = located.value if can_fail(node, config) else ""
    return Check(condition, rule, read, formula)


def _compared_with_null(node: ast.expr) -> set[str]:
    """The names that the condition itself compares with null."""
    tests = [inner for inner in ast.walk(node) if isinstance(inner, ast.Compare)]
    compared = [test.left for test in tests if isinstance(test.ops[0], ast.Is | ast.IsNot)]
    return {name.id for name in compared if isinstance(name, ast.Name)}


def _link_field(name: str, located: Located[ConfigField], known: Mapping[str, ConfigName], sink: Sink) -> ConfigName:
    found = _link_origin(name, located, known, sink, "value" if located.value.hf is None else "default")
    if located.value.texts:
        if found.type not in ("size", "int", "float"):
            message = f"texts: expected a number as type, got {found.type}"
            sink.error("SAGE206", message, located.span("texts"), "remove `texts`, or change `type`")
            raise Refused
        found = replace(found, texts=tuple(located.value.texts.items()))
    if "if_null" not in located.value.model_fields_set:
        return found
    if_null = _link_origin(name, located, known, sink, "if_null")
    if {found.type, if_null.type} == {"int", "float"} and located.value.type is None:
        if_null = replace(if_null, type=found.type)
    if if_null.type != found.type:
        message = f"if_null: expected {found.type}, got {if_null.type}"
        sink.error("SAGE206", message, located.span("if_null"), "change `if_null` or `type`")
        raise Refused
    return replace(found, is_optional=found.is_optional or if_null.is_optional, if_null=if_null)


def _link_origin(
    name: str, located: Located[ConfigField], known: Mapping[str, ConfigName], sink: Sink, origin: str
) -> ConfigName:
    """The name with the value of its field `origin`: value, default or if_null."""
    field = located.value
    keys = in_order(field.hf)
    for key in keys:
        if not CONFIG_KEY.match(key.removeprefix("/")):
            sink.error(
                "SAGE206", f"expected a key of config.json, got '{key}'", located.span("hf"), "write key or outer.key"
            )
            raise Refused
    doc = field.doc or (f"HF {keys[0]}" if keys else "fixed by the family")
    raw = getattr(field, origin)
    type_, items = _declared(field)
    if items is not None:
        return _link_list(name, located, known, sink, doc)
    if isinstance(raw, list):
        help = "declare `type: int[]` or `type: int[L]`"
        sink.error("SAGE206", f"the {origin} must be a single value, got a list", located.span(origin), help)
        raise Refused
    if origin not in field.model_fields_set:
        return ConfigName(name, keys, type_ or "int", False, None, None, doc)
    if raw is None and type_ not in (None, "int", "float"):
        sink.error("SAGE206", f"a {type_} must not be null", located.span(origin), "write a default that is not null")
        raise Refused
    if raw is None:
        return ConfigName(name, keys, type_ or "int", True, "None", None, doc)
    if isinstance(raw, str) and type_ != "str":
        text = located.text(raw, sink, origin)
        node = compile_expression(text, Names(known))
        kind = kind_of(node, text, Names(known))
        if kind.type == "null":
            raise text.refuse("SAGE206", f"the {origin} is always null", None, "write `null` without quotes")
        refined = _refined(cast(ConfigType, kind.type), type_, located, origin, sink)
        if kind.is_optional and refined not in ("int", "float"):
            raise text.refuse("SAGE206", f"a {refined} must not be null", None, "use another value in place of null")
        formula = raw if can_fail(node, known) or refined == "float" else ""
        return ConfigName(name, keys, refined, kind.is_optional, python_text(node), None, doc, None, formula)
    refined = _refined(_type_of_value(raw), type_, located, origin, sink)
    literal = repr(float(raw)) if refined == "float" else repr(raw)
    return ConfigName(name, keys, refined, False, literal, raw, doc)


def _declared(field: ConfigField) -> tuple[ConfigType | None, ListKind | None]:
    """The declared type of a value or of one list item, and the kind of list."""
    if field.type is None or "[" not in field.type:
        return cast(ConfigType | None, field.type), None
    base, _, length = field.type.rstrip("]").partition("[")
    return cast(ConfigType, base), "layers" if length else "list"


def _link_list(
    name: str, located: Located[ConfigField], known: Mapping[str, ConfigName], sink: Sink, doc: str
) -> ConfigName:
    """A list: either of any length, or with one value per layer, where the default may depend on the layer index."""
    field = located.value
    type_, items = _declared(field)
    keys = in_order(field.hf)
    origin = "value" if not keys else "default"
    raw = field.value if not keys else field.default
    found = ConfigName(name, keys, type_ or "int", False, None, None, doc, items)
    if items == "layers" and "L" not in known:
        message = f"'{name}' has one value per layer, so L must be declared before it"
        sink.error("SAGE206", message, located.key_span(), "move L up")
        raise Refused
    if origin not in field.model_fields_set:
        return found
    if isinstance(raw, list):
        for item in raw:
            if isinstance(item, bool) != (type_ == "bool") or not isinstance(item, _PYTHON[str(type_)]):
                help = f"change the item, or the type of '{name}'"
                sink.error("SAGE206", f"list item: expected {type_}, got '{item}'", located.span(origin), help)
                raise Refused
        return replace(found, default=repr(tuple(raw)))
    if items == "list" or not isinstance(raw, str):
        help = "write a list, or an expression of the layer index `i`" if items == "layers" else "write a list, e.g. []"
        sink.error("SAGE206", f"the {origin} of '{name}' must be a list", located.span(origin), help)
        raise Refused
    text, names = located.text(raw, sink, origin), Names(known, INDEX)
    node = compile_expression(text, names)
    kind = kind_of(node, text, names)
    if kind.is_optional:
        raise text.refuse("SAGE206", "a list item must not be null", None, "use a number such as 0 or -1")
    _refined(cast(ConfigType, kind.type), type_, located, origin, sink)
    return replace(found, default=python_text(node), formula=raw)


def _refined(
    found: ConfigType, declared: ConfigType | None, located: Located[ConfigField], origin: str, sink: Sink
) -> ConfigType:
    """The declared type if a value of the type found is allowed there (an int counts as a float)."""
    expected = declared or found
    if expected != found and not (expected == "float" and found == "int"):
        message = f"{origin}: expected {expected}, got {found}"
        sink.error("SAGE206", message, located.span(origin), f"change the {origin} or `type`")
        raise Refused
    return expected


def _type_of_value(value: Scalar) -> ConfigType:
    kinds: tuple[ConfigType, ...] = ("bool", "int", "float", "str")
    return next(kind for kind in kinds if isinstance(value, _PYTHON[kind]))
