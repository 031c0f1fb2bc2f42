"""Links conditions and attrs that are evaluated when a graph is built, as Python over the config `c` and the layer."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sageLLM.codegen.expr.config_text import python_text
from sageLLM.codegen.expr.satisfiable import Kind, Optional, may_hold
from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.link.expressions import Names, can_fail, compile_expression, kind_of, uses
from sageLLM.codegen.model.layout import Condition, ConfigName
from sageLLM.codegen.render import lit


@dataclass(frozen=True, slots=True)
class Index:
    """The layer index: its name in the layout's text, and in the generated function."""

    name: str
    python: str


def link_condition(
    text: Text, config: Mapping[str, ConfigName], index: Index | None, present: frozenset[str] = frozenset()
) -> Condition:
    """A condition on the config and the layer; raises Refused. The names in `present` are not null here."""
    names = Names(config, index.name if index else None)
    node = compile_expression(text, names, present)
    kind = kind_of(node, text, names, present)
    if kind.type != "bool":
        message = f"expected a condition, got '{text.value}': {kind.type}"
        raise text.refuse("SAGE214", message, None, "use a boolean config name or a comparison")
    if not config_may_hold(node, config, index.name if index else None):
        message = f"no config satisfies `{text.value}`"
        raise text.refuse("SAGE233", message, None, "correct the condition or remove what depends on it")
    is_layers = index is not None and uses(node, index.name)
    python = expression_text(node, text.value, config, index)
    return Condition(text.value, python, index.python if index is not None and is_layers else None)


def config_may_hold(
    node: ast.expr, config: Mapping[str, ConfigName], index: str | None, *, has_fixed: bool = False
) -> bool:
    """Whether a condition holds for some config.

    With `has_fixed`, a name that the family fixes has that value only. Otherwise it is free, since inherited statements
    may depend on a switch that a layout turns off.
    """

    def kind(leaf: str) -> Kind | Optional | Sequence[object]:
        if leaf == index:
            return "index"
        if " in " in leaf:
            return "bool"
        found = config.get(leaf.partition("[")[0])
        if found is None:
            return "any"
        if has_fixed and not found.keys and found.items is None and found.value is not None:
            return (found.value,)
        kinds: dict[str, Kind] = {"size": "size", "int": "int", "float": "float", "bool": "bool", "str": "text"}
        one = kinds.get(found.type, "any")
        return Optional(one) if found.is_optional and found.items is None else one

    return may_hold(node, kind)


def expression_text(node: ast.expr, source: str, config: Mapping[str, ConfigName], index: Index | None) -> str:
    """An expression as Python over `c`.

    Arithmetic that may fail is wrapped in `computed`, which reports the failure with the expression's source.
    """
    python = python_text(node, lambda name: index.python if index and name == index.name else f"c.{name}")
    if not can_fail(node, config):
        return python
    if index is None or not uses(node, index.name):
        return f"computed({lit(source)}, lambda: {python})"
    return f"computed_in_layer({index.python}, {lit(source)}, lambda {index.python}: {python})"
