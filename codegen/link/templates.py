"""Checks that the holes of a template match the hooks and parameters of the op."""

import re
from collections.abc import Mapping

from jinja2 import TemplateError, TemplateNotFound, meta, nodes

from sageLLM.codegen.diagnostics import Sink, Span, did_you_mean
from sageLLM.codegen.folders import TEMPLATES
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import Template
from sageLLM.codegen.render import Renderer
from sageLLM.codegen.schema.ops import OpSpec

TRITON = "triton"
PRODUCT = "linear"
"""The template in templates/triton for a `compute` that is one matrix product."""

_OF_HOOKS = frozenset({"names", "plain", "first", "stop", "unmasked"})
_OF_EQUATIONS = frozenset(
    {"summary", "parameters", "arguments", "rows", "x", "w", "y", "extra", "epilogue", "elements", "shape", "dtype"}
    | {"x_rows", "y_rows", "heads", "x_head", "w_head", "y_head"}
)  # fmt: skip
STANDARD = {
    "reference": frozenset({"op", "attrs", "used", "plain"}),
    TRITON: _OF_HOOKS | _OF_EQUATIONS | {"op", "attrs", "passed"},
}
"""Variables that the generator passes to all templates of a folder, besides the op's hooks and parameters."""


def link_triton(entry: Entry[OpSpec], renderer: Renderer, sink: Sink) -> Template | None:
    """The op's Triton template; None if the op has none, or after a finding."""
    spec = entry.spec
    if spec.kernel is None or spec.kernel.triton is None:
        return None
    name, params = spec.reference or PRODUCT, spec.kernel.triton
    filled = {name: ("triton", name) for name in params} | {name: ("hooks", name) for name in spec.kernel.hooks}
    check_template(TRITON, name, filled, entry, entry.key_span("kernel", "triton"), renderer, sink)
    for key, value in params.items():
        is_block = key.startswith("BLOCK")  # a tile size, which Triton requires to be a power of 2
        if not 1 <= value <= 2**16 or (is_block and value & (value - 1)):
            expected = "a power of 2, at most 2**16" if is_block else "1 to 2**16"
            span = entry.span("kernel", "triton", key)
            sink.error("SAGE124", f"{key} must be {expected}, got {value}", span, "use for example 64")
    return Template(f"{TRITON}/{name}.py.jinja", tuple(params.items()))


def check_template(
    folder: str,
    name: str,
    filled: Mapping[str, tuple[str, str]],
    entry: Entry[OpSpec],
    span: Span,
    renderer: Renderer,
    sink: Sink,
) -> None:
    """Reports a missing template, and differences between its holes and `filled`: hole -> path under `kernel`."""
    template = f"{folder}/{name}.py.jinja"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or renderer.find(template) is None:
        known = [found.name.removesuffix(".py.jinja") for found in (TEMPLATES / folder).glob("[a-z]*.py.jinja")]
        help = f"{did_you_mean(name, known)}, or add templates/{template} to the spec folder"
        sink.error("SAGE123", f"expected a template in templates/{folder}, got '{name}'", span, help)
        return
    try:
        found = holes(template, renderer) - STANDARD[folder]
    except TemplateError as error:
        place = f"{renderer.display(template)}:{getattr(error, 'lineno', 1)}"
        sink.error("SAGE123", f"the template '{name}' does not parse: {error.message}", span, f"correct {place}")
        return
    except (OSError, UnicodeDecodeError) as error:
        sink.error(
            "SAGE123", f"the template {renderer.display(template)} cannot be read: {error}", span, "correct the file"
        )
        return
    for hole in sorted(found - filled.keys()):
        section = "kernel.triton or kernel.hooks" if folder == TRITON else "kernel.params or kernel.hooks"
        message = f"the op must fill the hole '{hole}' of the template '{name}'"
        sink.error("SAGE124", message, span, f"add {hole} to {section}")
    for extra in sorted(filled.keys() - found):
        message = f"unknown hole '{extra}' of the template '{name}'"
        sink.error("SAGE124", message, entry.key_span("kernel", *filled[extra]), did_you_mean(extra, found))


def holes(template: str, renderer: Renderer) -> set[str]:
    """The undeclared variables of a template and of the templates that it includes."""
    path = renderer.find(template)
    if path is None:
        raise TemplateNotFound(template, f"'{template}' does not exist")
    tree = renderer.env.parse(path.read_text("utf-8"))
    found = set(meta.find_undeclared_variables(tree))
    declared = {node.target.name for node in tree.find_all(nodes.AssignBlock) if isinstance(node.target, nodes.Name)}
    declared |= {node.target.name for node in tree.find_all(nodes.Assign) if isinstance(node.target, nodes.Name)}
    for included in meta.find_referenced_templates(tree):
        if included is None:
            raise TemplateError("the name of an included template must be a literal")
        found |= holes(included, renderer) - declared
    return found
