"""Checks that the holes of a template match the hooks and parameters of the op."""

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import TemplateError, meta, nodes

from sageLLM.codegen.diagnostics import Sink, Span, did_you_mean
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import Template
from sageLLM.codegen.render import TEMPLATES, Renderer
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
    TRITON: _OF_HOOKS | _OF_EQUATIONS | {"op", "attrs"},
}
"""Variables that the generator passes to all templates of a folder, besides the op's hooks and parameters."""


def link_triton(entry: Entry[OpSpec], sink: Sink) -> Template | None:
    """The op's Triton template; None if the op has none, or after a finding."""
    spec = entry.spec
    if spec.kernel is None or spec.kernel.triton is None:
        return None
    name, params = spec.reference or PRODUCT, spec.kernel.triton
    filled = {name: ("triton", name) for name in params} | {name: ("hooks", name) for name in spec.kernel.hooks}
    check_template(TRITON, name, filled, entry, entry.key_span("kernel", "triton"), sink)
    for key, value in params.items():
        is_block = key.startswith("BLOCK")  # a tile size, which Triton requires to be a power of 2
        if not 1 <= value <= 2**16 or (is_block and value & (value - 1)):
            expected = "a power of 2, at most 2**16" if is_block else "1 to 2**16"
            span = entry.span("kernel", "triton", key)
            sink.error("SAGE124", f"{key} must be {expected}, got {value}", span, "use for example 64")
    return Template(f"{TRITON}/{name}.py.jinja", tuple(params.items()))


def check_template(
    folder: str, name: str, filled: Mapping[str, tuple[str, str]], entry: Entry[OpSpec], span: Span, sink: Sink
) -> None:
    """Reports a missing template, and differences between its holes and `filled`: hole -> path under `kernel`."""
    path = TEMPLATES / folder / f"{name}.py.jinja"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not path.is_file():
        known = [found.name.removesuffix(".py.jinja") for found in (TEMPLATES / folder).glob("[a-z]*.py.jinja")]
        sink.error(
            "SAGE123", f"expected a template in templates/{folder}, got '{name}'", span, did_you_mean(name, known)
        )
        return
    try:
        found = holes(path) - STANDARD[folder]
    except TemplateError as error:
        sink.error("SAGE123", f"the template '{name}' does not parse: {error.message}", span, "correct the template")
        return
    for hole in sorted(found - filled.keys()):
        section = "kernel.triton or kernel.hooks" if folder == TRITON else "kernel.params or kernel.hooks"
        message = f"the op must fill the hole '{hole}' of the template '{name}'"
        sink.error("SAGE124", message, span, f"add {hole} to {section}")
    for extra in sorted(filled.keys() - found):
        message = f"unknown hole '{extra}' of the template '{name}'"
        sink.error("SAGE124", message, entry.key_span("kernel", *filled[extra]), did_you_mean(extra, found))


def holes(path: Path) -> set[str]:
    """The undeclared variables of a template and of the templates that it includes."""
    tree = Renderer().env.parse(path.read_text("utf-8"))
    found = set(meta.find_undeclared_variables(tree))
    declared = {node.target.name for node in tree.find_all(nodes.AssignBlock) if isinstance(node.target, nodes.Name)}
    declared |= {node.target.name for node in tree.find_all(nodes.Assign) if isinstance(node.target, nodes.Name)}
    for included in meta.find_referenced_templates(tree):
        assert included is not None, f"{path.name}: the name of an included template must be a literal"
        found |= holes(TEMPLATES / included) - declared
    return found
