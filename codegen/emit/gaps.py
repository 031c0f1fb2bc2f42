"""Targets on which an op runs its torch reference, with the reasons, and slow fusions.

`generate` and `explain` show them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sageLLM.codegen.diagnostics import Diagnostic
from sageLLM.codegen.emit.cpu import why_no_cpu_kernel
from sageLLM.codegen.emit.triton import MOVES_NOTHING, why_no_triton_kernel
from sageLLM.codegen.kernel.cost import slow_fusion
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Renderer

TARGETS = {"cpu": "C++", "triton": "Triton"}


@dataclass(frozen=True, slots=True)
class KernelGap:
    """An op without a kernel for one target."""

    op: OpDef
    target: str
    reason: str

    @property
    def note(self) -> str:
        """`specs/ops/x.yaml:3:3: note: 'x' runs its torch reference instead of a Triton kernel: it computes in f64`"""
        instead = f"runs its torch reference instead of a {TARGETS[self.target]} kernel"
        return f"{self.op.entry.key_span()}: note: '{self.op.name}' {instead}: {self.reason}"


def kernel_gaps(ops: Sequence[OpDef], specs: Specs, programs: Programs, renderer: Renderer) -> list[KernelGap]:
    """The gaps of the ops, in order. Collectives have none: they are calls of a communication library."""
    hardware = specs.hardware.get("cpu")
    has_gemm = hardware is not None and hardware.spec.gemm is not None
    found = []
    for op in filter(_has_kernels, ops):
        reasons = {
            "cpu": why_no_cpu_kernel(op, programs, renderer, has_gemm=has_gemm),
            "triton": why_no_triton_kernel(op, programs, renderer),
        }
        found += [KernelGap(op, target, reason) for target, reason in reasons.items() if reason is not None]
    return found


def slow_fusions(ops: Sequence[OpDef], specs: Specs, programs: Programs) -> list[Diagnostic]:
    """Warnings about fused ops that the cost model of the CPU calls slower than their calls."""
    device = specs.hardware.get("cpu")
    found = [slow_fusion(op, programs, device.spec) for op in ops] if device is not None else []
    return [one.warning for one in found if one is not None]


def _has_kernels(op: OpDef) -> bool:
    return not op.op_type.startswith("COMM_")


def kernel_table(ops: Sequence[OpDef], specs: Specs) -> str:
    """All ops but collectives with their kernels as text, the reason where there is none, and the counts."""
    shown = list(filter(_has_kernels, ops))
    gaps = {
        (gap.op.name, gap.target): gap.reason
        for gap in kernel_gaps(ops, specs, Programs(specs.ops), Renderer(specs.raw.templates))
    }
    lines, width = [], max((len(op.name) for op in shown), default=0)
    for op in shown:
        lines.append(f"{op.name:{width}}  {', '.join(_targets(op, gaps))}")
        lines += [f"{'':{width}}  no {name}: {gaps[op.name, name]}" for name in TARGETS if (op.name, name) in gaps]
        lines += [f"{'':{width}}  {text}" for text in references(op, specs)]
    counts = {name: sum(name in _targets(op, gaps) for op in shown) for name in TARGETS}
    total = ", ".join(f"{count} with {TARGETS[name]} kernels" for name, count in counts.items())
    views = sum("view" in _targets(op, gaps) for op in shown)
    return "\n".join([*lines, "", f"{len(shown)} ops: {total}" + (f", {views} views on GPUs" if views else "")])


def references(op: OpDef, specs: Specs) -> list[str]:
    """The sizes at which the op's Triton kernel has no configuration, so that its launcher runs the reference."""
    found: dict[str, list[str]] = {}
    template = op.triton.name.rpartition("/")[2].partition(".")[0] if op.triton is not None else ""
    for target, entry in specs.raw.targets.items():
        rows = entry.spec.kernels.get(template, [])
        for row in (row for row in rows if row.reference is not None):
            kernels = [other.up_to for other in rows if other.use and other.up_to.get("E") == row.up_to.get("E")]
            above = f", above {_bounds(kernels[-1])}" if kernels else ""
            found.setdefault(f"reference up to {_bounds(row.up_to)}{above}: {row.reference}", []).append(target)
    return [f"{', '.join(targets)}: {text}" for text, targets in found.items()]


def _bounds(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def _targets(op: OpDef, gaps: Mapping[tuple[str, str], str]) -> list[str]:
    """`reference, cpu, triton`; an op that only moves data is a view or a copy by torch on GPUs."""
    found = [name for name in TARGETS if (op.name, name) not in gaps]
    return ["reference", *("view" if name == "triton" and op.op_type in MOVES_NOTHING else name for name in found)]
