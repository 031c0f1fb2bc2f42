"""Emitters, grouped by their inputs: an ops file, a model, all passes, a device, the vocabulary, rows of other files.

The groups are the units of incremental generation, so that the docstrings here are contracts: a function must read
nothing else. Emitters are imported on first use, because a change of an op needs no emitter of models or passes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sageLLM.codegen.contents import Contents, Row
from sageLLM.codegen.diagnostics import no_line, render
from sageLLM.codegen.render import Output, Renderer

if TYPE_CHECKING:
    from sageLLM.codegen.load import Entry
    from sageLLM.codegen.model.format import MethodDef
    from sageLLM.codegen.model.layout import ModelDef
    from sageLLM.codegen.model.op import OpDef
    from sageLLM.codegen.model.specs import Specs
    from sageLLM.codegen.schema.hardware import HardwareFile


def emit_op_modules(ops: "Sequence[OpDef]", specs: "Specs", renderer: Renderer) -> list[Output]:
    """Nodes, kernels and tests of the ops of one file. Reads these ops, the ops that they fuse, and the CPU's entry."""
    from sageLLM.codegen.emit.cpu import emit_cpu
    from sageLLM.codegen.emit.gaps import kernel_gaps, slow_fusions
    from sageLLM.codegen.emit.op_tests import emit_op_tests
    from sageLLM.codegen.emit.ops import emit_ops
    from sageLLM.codegen.emit.reference import emit_reference
    from sageLLM.codegen.emit.triton import emit_triton
    from sageLLM.codegen.kernel.cost import with_kernel_cost
    from sageLLM.codegen.kernel.inline import Programs

    programs = Programs(specs.ops)
    notes = [gap.note for gap in kernel_gaps(ops, specs, programs, renderer)]
    notes += [render(warning, no_line) for warning in slow_fusions(ops, specs, programs)]
    return [
        *emit_ops([with_kernel_cost(op, programs) for op in ops], specs, renderer),
        *(replace(output, notes=tuple(notes)) for output in emit_reference(ops, specs, renderer)),
        *emit_triton(ops, specs, renderer, programs),
        *emit_cpu(ops, specs, renderer, programs),
        *emit_op_tests(ops, specs, renderer),
    ]


def emit_op_docs(ops: "Sequence[OpDef]", specs: "Specs", rows: Sequence[Row]) -> list[Output]:
    """The page of one ops file. Reads these ops, the ops that they fuse, and the rows of passes and models."""
    from sageLLM.codegen.emit.docs import Uses, emit_op_page
    from sageLLM.codegen.kernel.cost import with_kernel_cost
    from sageLLM.codegen.kernel.inline import Programs

    programs = Programs(specs.ops)
    return emit_op_page([with_kernel_cost(op, programs) for op in ops], {op.name: Uses.of(op.name, rows) for op in ops})


def emit_model(model: "ModelDef", specs: "Specs", renderer: Renderer) -> list[Output]:
    """Builder and page of one model. Reads the model, and the interfaces of ops."""
    from sageLLM.codegen.emit.builders import emit_builder
    from sageLLM.codegen.emit.docs import emit_model_page

    return [*emit_builder(model, specs, renderer), *emit_model_page(model)]


def emit_pass_modules(specs: "Specs", renderer: Renderer) -> list[Output]:
    """Modules, tests and table of all passes. Reads the passes, and the interfaces of ops."""
    from sageLLM.codegen.emit.passes import emit_passes
    from sageLLM.codegen.emit.rule_tests import emit_rule_tests

    return [*emit_passes(specs, renderer), *emit_rule_tests(specs, renderer)]


def emit_device(entry: "Entry[HardwareFile]", renderer: Renderer) -> list[Output]:
    """The module of one device."""
    from sageLLM.codegen.emit.hardware import emit_hardware

    return emit_hardware(entry, renderer)


def emit_dialect_modules(specs: "Specs", renderer: Renderer) -> list[Output]:
    """Modules, pages, tests and table of all dialects. Reads the dialects."""
    from sageLLM.codegen.emit.dialects import emit_dialects

    return emit_dialects(specs, renderer)


def emit_method(method: "MethodDef", renderer: Renderer, *, is_overlay: bool) -> list[Output]:
    """The modules and the page of one quantisation method."""
    from sageLLM.codegen.emit import formats

    return formats.emit_method(method, renderer, is_overlay=is_overlay)


def emit_support(specs: "Specs", renderer: Renderer) -> list[Output]:
    """Files that depend on the vocabulary of the specs at most."""
    from sageLLM.codegen.emit.docs import emit_language_page
    from sageLLM.codegen.emit.formats import emit_format_support
    from sageLLM.codegen.emit.op_tests import emit_op_checks
    from sageLLM.codegen.emit.ops import emit_op_types
    from sageLLM.codegen.emit.package import emit_package
    from sageLLM.codegen.emit.reference import emit_reference_support
    from sageLLM.codegen.emit.rule_tests import emit_rule_checks
    from sageLLM.codegen.emit.schemas import emit_schemas
    from sageLLM.codegen.emit.triton import emit_triton_support

    emitters = (
        emit_op_types,
        emit_reference_support,
        emit_triton_support,
        emit_op_checks,
        emit_rule_checks,
        emit_format_support,
    )
    rendered = [output for emitter in emitters for output in emitter(specs, renderer)]
    return [*rendered, *emit_language_page(specs), *emit_schemas(specs), *emit_package()]


def emit_tables(contents: Contents, renderer: Renderer) -> list[Output]:
    """The tables of ops, kernels, cases, models, devices and formats. Reads names, and the rows of other files."""
    from sageLLM.codegen.emit.builders import emit_builder_table
    from sageLLM.codegen.emit.cpu import emit_cpu_table
    from sageLLM.codegen.emit.formats import emit_format_table
    from sageLLM.codegen.emit.hardware import emit_device_table
    from sageLLM.codegen.emit.op_tests import emit_case_table
    from sageLLM.codegen.emit.ops import emit_op_table
    from sageLLM.codegen.emit.reference import emit_reference_table
    from sageLLM.codegen.emit.triton import emit_triton_table

    emitters = (
        emit_op_table,
        emit_reference_table,
        emit_triton_table,
        emit_cpu_table,
        emit_case_table,
        emit_builder_table,
        emit_device_table,
        emit_format_table,
    )
    return [output for emitter in emitters for output in emitter(contents, renderer)]
