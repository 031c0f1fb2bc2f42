"""The generator as one pipeline: load, link, emit, format, write."""

from collections.abc import Sequence
from pathlib import Path

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.emit import (
    emit_device,
    emit_model,
    emit_op_docs,
    emit_op_modules,
    emit_pass_modules,
    emit_support,
    emit_tables,
)
from sageLLM.codegen.expectations import COUNTED, Count, check_expectations
from sageLLM.codegen.link.models import link_models
from sageLLM.codegen.link.ops import link_ops
from sageLLM.codegen.link.passes import link_passes
from sageLLM.codegen.load import RawSpecs, load_specs
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer
from sageLLM.codegen.writer import Written, changes, drift, finish, write

PACKAGE = Path(__file__).resolve().parent.parent
BASE_SPECS = PACKAGE / "specs"
BASE_OUT = PACKAGE / "generated"


def load_and_link(overlays: Sequence[Path] = (), base: Path = BASE_SPECS) -> Specs:
    """The linked specs; raises SpecErrors with every finding of the first stage that has one."""
    return link(load_specs([base, *overlays]))


def link(raw: RawSpecs) -> Specs:
    """What the entries mean together."""
    sink = Sink()
    ops = link_ops(raw, sink)
    sink.raise_if_any()
    models = link_models(raw, ops, sink)
    passes = link_passes(raw, ops, sink)
    sink.raise_if_any()
    return Specs(raw, ops, models, passes, raw.hardware)


def emit(specs: Specs) -> list[Output]:
    """Every generated file, not yet formatted."""
    renderer, own = Renderer(), specs.own()
    modules = [output for ops in own.ops_by_stem.values() for output in emit_op_modules(ops, specs, renderer)]
    models = [output for model in own.models for output in emit_model(model, specs, renderer)]
    passes = emit_pass_modules(specs, renderer)
    devices = [output for entry in own.devices for output in emit_device(entry, renderer)]
    uses = [row for output in (*models, *passes) for row in output.rows]
    pages = [output for ops in own.ops_by_stem.values() for output in emit_op_docs(ops, uses)]
    tables = emit_tables(own.contents(modules), renderer)
    return [*modules, *models, *passes, *devices, *pages, *emit_support(specs, renderer), *tables]


def generate(
    overlays: Sequence[Path] = (), out: Path = BASE_OUT, base: Path = BASE_SPECS, count: Count | None = None
) -> Written:
    """Brings the tree at `out` up to date with the specs.

    With `count`, a tree whose passes do not fire as often as expected is not written; SpecErrors says where.
    """
    specs = load_and_link(overlays, base)
    outputs = finish(emit(specs), out)
    if count is not None and any(path.startswith(COUNTED) for path in changes(outputs, out)):
        check_expectations(specs, outputs, count)
    return write(outputs, out)


def check(
    overlays: Sequence[Path] = (), out: Path = BASE_OUT, base: Path = BASE_SPECS, count: Count | None = None
) -> list[str]:
    """How `out` differs from what the specs generate. Nothing is taken over from `out`; `count` as in `generate`."""
    specs = load_and_link(overlays, base)
    outputs = finish(emit(specs))
    if count is not None:
        check_expectations(specs, outputs, count)
    return drift(outputs, out)
