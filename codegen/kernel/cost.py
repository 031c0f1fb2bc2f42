"""Costs of ops as their kernels compute them, and fusions that cost more than the calls that they replace.

The linker derives a cost from the equations, in which every value is computed once. The C++ kernel of an op with a
product that is not a GEMM computes the operands of the product again for every element of the result.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sageLLM.codegen.diagnostics import Diagnostic
from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import Dot, walk
from sageLLM.codegen.kernel.epilogue import fused_epilogue_of
from sageLLM.codegen.kernel.gemm import gemm_of
from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.lower import row_program
from sageLLM.codegen.kernel.work import row_flops
from sageLLM.codegen.model.binding import bound_calls
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.hardware import HardwareFile

SIZE = 1024
"""The dims at which a fusion and its calls are compared."""
ELEMENT_BYTES = 2


def with_kernel_cost(op: OpDef, programs: Programs) -> OpDef:
    """The op with the arithmetic of its kernel as its cost."""
    program = programs.of(op)
    has_product = program and any(isinstance(one, Dot) for s in program.statements for one in walk(s.value))
    if not has_product or gemm_of(op, programs) is not None or fused_epilogue_of(op, programs) is not None:
        return op
    try:
        flops = row_flops(row_program(op, programs))
    except LoweringError:
        return op
    return replace(op, cost=replace(op.cost, flops=flops))


@dataclass(frozen=True, slots=True)
class SlowFusion:
    """A fusion that takes longer than its calls; `factor` is the ratio of the times of the cost model."""

    op: OpDef
    factor: float

    @property
    def warning(self) -> Diagnostic:
        return Diagnostic(
            "SAGE138",
            f"'{self.op.name}' takes {self.factor:.1f} times as long as its calls if all sizes are {SIZE}, as its C++ "
            "kernel computes values again for each element of a product",
            self.op.entry.key_span("fuses"),
            "fuse a single product of values E[..., K] and a weight E[N, K]; before it, ops that compute rows of such "
            "values; after it, ops that read one element",
            severity="warning",
        )


def slow_fusion(op: OpDef, programs: Programs, device: HardwareFile) -> SlowFusion | None:
    """The comparison of a fused op with its calls on a device, or None if it is not slower."""
    if not op.fuses:
        return None
    fused = with_kernel_cost(op, programs)
    if fused is op:
        return None
    fused_us = _time_us([(fused.cost.flops, fused.cost.bytes)], device)
    calls_us = _time_us(_calls(op, programs), device)
    return SlowFusion(op, fused_us / calls_us) if fused_us > calls_us else None


def _calls(op: OpDef, programs: Programs) -> list[tuple[Size, Size]]:
    """Operations and bytes of each call that is not a view."""
    found = []
    for _, callee, binding, _ in bound_calls(op.fuses, op.inputs, programs.ops):
        cost = with_kernel_cost(callee, programs).cost
        if not callee.is_view:
            found.append((binding.formula(cost.flops), binding.formula(cost.bytes)))
    return found


def _time_us(kernels: Iterable[tuple[Size, Size]], device: HardwareFile) -> float:
    """The roofline of `runtime.core.cost` for kernels that run one after the other, in bf16."""
    peak, total = device.peak_flops.get("bf16") or min(device.peak_flops.values()), 0.0
    for flops, moved in kernels:
        limit = max(_number(flops) / peak, _number(moved) / device.memory_bandwidth)
        total += limit * 1e6 + device.launch_overhead_us
    return total


def _number(size: Size) -> float:
    env = {name: _value(name) for name in size.symbols}
    return float(size.evaluate(env))


def _value(symbol: str) -> int:
    if symbol.startswith("has_"):
        return 1
    return ELEMENT_BYTES if symbol.endswith("_size") else SIZE
