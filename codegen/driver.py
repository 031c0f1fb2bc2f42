"""The generator pipeline: load, link, emit, format, write.

`generate` first tries an incremental update (`codegen.update`). The other functions always run every stage in full.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sageLLM.codegen.diagnostics import Diagnostic, Sink, SpecErrors
from sageLLM.codegen.facts import Undeclared
from sageLLM.codegen.render import Output, Renderer
from sageLLM.codegen.state import other_sources, save_sources
from sageLLM.codegen.update import update
from sageLLM.codegen.writer import Written, changes, drift, finish, refuse_project_root, write

if TYPE_CHECKING:
    from sageLLM.codegen.expectations import Count
    from sageLLM.codegen.link.memo import LinkMemo
    from sageLLM.codegen.load import RawSpecs
    from sageLLM.codegen.model.specs import Specs

PACKAGE = Path(__file__).resolve().parent.parent
BASE_SPECS = PACKAGE / "specs"
BASE_OUT = PACKAGE / "generated"
IS_CHECKOUT = (PACKAGE / "pyproject.toml").is_file()
"""Whether the package is a checkout, where users edit its specs, rather than installed."""


def load_and_link(overlays: Sequence[Path] = (), base: Path = BASE_SPECS, memo: "LinkMemo | None" = None) -> "Specs":
    """The linked specs. Raises SpecErrors with all findings of the first stage that has any."""
    from sageLLM.codegen.load import load_specs

    return link(load_specs([base, *overlays], memo.load_file if memo else None), memo)


def link(raw: "RawSpecs", memo: "LinkMemo | None" = None) -> "Specs":
    """Links all entries. With `memo`, entries that earlier calls linked without findings are reused."""
    from sageLLM.codegen.link.dialects import link_dialects
    from sageLLM.codegen.link.entry_names import check_entry_names
    from sageLLM.codegen.link.formats import link_methods
    from sageLLM.codegen.link.interfaces import Interfaces
    from sageLLM.codegen.link.models import link_models
    from sageLLM.codegen.link.ops import link_op, link_ops
    from sageLLM.codegen.link.passes import link_passes
    from sageLLM.codegen.model.specs import Specs

    sink = Sink()
    check_entry_names(raw, sink)
    ops = link_ops(raw, sink, memo.link_op if memo else link_op)
    sink.raise_if_any()
    models = link_models(raw, ops, sink, link=memo.link_model if memo else None)
    passes = link_passes(raw, Interfaces(ops), sink)
    dialects = link_dialects(raw, sink)
    methods = link_methods(raw.formats, sink)
    sink.raise_if_any()
    return Specs(raw, ops, models, passes, raw.hardware, dialects, methods)


def emit(specs: "Specs") -> list[Output]:
    """Every generated file, before formatting."""
    from sageLLM.codegen import emit as emitters

    renderer, own = Renderer(specs.raw.templates), specs.own()
    modules = [output for ops in own.ops_by_stem.values() for output in emitters.emit_op_modules(ops, specs, renderer)]
    models = [output for model in own.models for output in emitters.emit_model(model, specs, renderer)]
    passes = emitters.emit_pass_modules(specs, renderer)
    devices = [output for entry in own.devices for output in emitters.emit_device(entry, renderer)]
    dialects = emitters.emit_dialect_modules(specs, renderer)
    methods = [
        output for method in own.methods for output in emitters.emit_method(method, renderer, is_overlay=own.is_overlay)
    ]
    uses = [row for output in (*models, *passes) for row in output.rows]
    pages = [output for ops in own.ops_by_stem.values() for output in emitters.emit_op_docs(ops, specs, uses)]
    tables = emitters.emit_tables(own.contents(modules), renderer)
    made = [*modules, *models, *passes, *devices, *dialects, *methods, *pages]
    return [*made, *emitters.emit_support(specs, renderer), *tables]


def generate(
    overlays: Sequence[Path] = (), out: Path = BASE_OUT, base: Path = BASE_SPECS, count: "Count | None" = None
) -> Written:
    """Updates the tree at `out` after changes of the specs.

    With `count`, passes must fire as often as their specs expect; otherwise SpecErrors is raised, and no file written.
    """
    refuse_project_root(out)
    if other := other_sources(overlays, out):
        message = f"'{out}' contains the code of other specs ({other})"
        help = "choose another --out, or delete the folder if it is no longer used"
        raise SpecErrors([Diagnostic("SAGE505", message, help=help)])
    try:
        written = update([base, *overlays], out, BASE_OUT, count)
    except (SpecErrors, Undeclared):
        # a run from scratch reports all findings of a stage, not only those that the change causes
        written = generate_from_scratch(overlays, out, base, count)
    if overlays:
        save_sources(overlays, out)
    return written


def generate_from_scratch(
    overlays: Sequence[Path] = (), out: Path = BASE_OUT, base: Path = BASE_SPECS, count: "Count | None" = None
) -> Written:
    """Generates everything without reading or leaving the state of incremental updates."""
    from sageLLM.codegen.expectations import COUNTED, check_expectations

    refuse_project_root(out)
    specs = load_and_link(overlays, base)
    outputs = finish(emit(specs))
    if count is not None and any(path.startswith(COUNTED) for path in changes(outputs, out)):
        check_expectations(specs.raw, outputs, count)
    return write(outputs, out).with_notes(outputs)


def check(
    overlays: Sequence[Path] = (), out: Path = BASE_OUT, base: Path = BASE_SPECS, count: "Count | None" = None
) -> list[str]:
    """The drift between `out` and the specs. Everything is generated from scratch; no state of earlier runs is read."""
    specs = load_and_link(overlays, base)
    outputs = finish(emit(specs))
    if count is not None:
        from sageLLM.codegen.expectations import check_expectations

        check_expectations(specs.raw, outputs, count)
    return drift(outputs, out)
