"""Links ops with a `reference`: the template, its parameters, and its hook expressions."""

from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Sink, did_you_mean
from sageLLM.codegen.expr.check import Checker
from sageLLM.codegen.expr.scope import Scope
from sageLLM.codegen.expr.syntax import Refused, Text, parse_expression
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.templates import check_template
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import Hook, Reference
from sageLLM.codegen.render import Renderer
from sageLLM.codegen.schema.ops import KernelSpec, OpSpec

FOLDER = "reference"


@dataclass(frozen=True, slots=True)
class HookType:
    """The names that a hook may use in addition to the op's attrs, and the element type of its result."""

    names: Mapping[str, str]
    result: str


HOOKS: Mapping[str, HookType] = {
    "score_mod": HookType({"score": "f32", "m": "i64", "n": "i64", "h": "i64"}, "f32"),
    "mask_mod": HookType({"m": "i64", "n": "i64", "h": "i64"}, "bool"),
}
"""score: scaled product of query and key; m, n: positions of the query and the key; h: query head."""


def link_reference(entry: Entry[OpSpec], scope: Scope, renderer: Renderer, sink: Sink) -> Reference | None:
    """The reference with its hooks, or None after a finding."""
    before = len(sink.diagnostics)
    kernel = entry.spec.kernel or KernelSpec()
    hooks = tuple(hook for name, text in kernel.hooks.items() if (hook := _hook(name, text, entry, scope, sink)))
    name = entry.spec.reference or ""
    filled = {param: ("params", param) for param in kernel.params} | {hook: ("hooks", hook) for hook in kernel.hooks}
    check_template(FOLDER, name, filled, entry, entry.span("reference"), renderer, sink)
    reference = Reference(f"{FOLDER}/{name}.py.jinja", tuple(kernel.params.items()), hooks)
    return reference if len(sink.diagnostics) == before else None


def _hook(name: str, value: str, entry: Entry[OpSpec], scope: Scope, sink: Sink) -> Hook | None:
    path = ("kernel", "hooks", name)
    if name not in HOOKS:
        sink.error("SAGE124", f"unknown hook '{name}'", entry.key_span(*path), did_you_mean(name, HOOKS))
        return None
    for known in scope.attrs.keys() & HOOKS[name].names.keys():
        message = f"the attr '{known}' must not have the name of a value of the hook '{name}'"
        sink.error("SAGE124", message, entry.key_span("attrs", known), "rename the attr")
    hook, text = HOOKS[name], Text.of(value, entry, path, sink)
    values = {known: ValueType(element) for known, element in hook.names.items()}
    optional = frozenset(name for name in scope.optional if name in scope.attrs)
    try:
        checked = Checker(text, Scope(values, scope.attrs, {}, {}, optional)).expression(parse_expression(text))
        if checked.type.element not in (hook.result, "truth" if hook.result == "bool" else "float"):
            message = f"{name}: expected {hook.result}, got {checked.type.element}"
            raise text.refuse("SAGE109", message, None, f"write an expression of type {hook.result}")
    except Refused:
        return None
    return Hook(name, value, checked)
