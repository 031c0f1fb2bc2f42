"""Weights by form: the kernels that read them, and the reasons for quantised weights that are dequantised."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.executor.planner import Planner
from sageLLM.runtime.kernels.cpu.coded import group_of
from sageLLM.runtime.kernels.cpu.packing import PackedWeight


@dataclass(frozen=True, slots=True)
class WeightStats:
    """Weights of one form, such as "int4 in groups of 128" or "bfloat16", and the bytes of all of them.

    `reason` is set for quantised weights that were dequantised.
    """

    form: str
    kernel: str
    num_weights: int
    num_bytes: int
    reason: str | None = None

    def __str__(self) -> str:
        text = f"{self.num_weights} weights in {self.form}, {self.num_bytes / 2**20:.1f} MiB: {self.kernel}"
        return text if self.reason is None else f"{text}, dequantised: {self.reason}"


def weight_stats(
    weights: Mapping[str, Weight], ties: Mapping[str, str], planner: Planner, reasons: Mapping[str, str]
) -> list[WeightStats]:
    """The matrices of a model by form, after `Planner.prepare_weights`. A tied weight counts once.

    `reasons` are those of weights that were dequantised when they were loaded.
    """
    kernels = planner.gemm_kernels({one.form for one in weights.values() if isinstance(one, PackedWeight)})
    found: dict[tuple[str, str, str | None], WeightStats] = {}
    for name, weight in weights.items():
        if name in ties or len(weight.shape) < 2:
            continue
        form, num_bytes = _form(weight)
        kernel = kernels.get(weight.form, "") if isinstance(weight, PackedWeight) else "not packed"
        one = WeightStats(form, kernel, 0, 0, reasons.get(name))
        key = form, kernel, one.reason
        held = found.get(key, one)
        found[key] = replace(held, num_weights=held.num_weights + 1, num_bytes=held.num_bytes + num_bytes)
    return list(found.values())


def _form(weight: Weight) -> tuple[str, int]:
    if isinstance(weight, PackedWeight):
        num_bytes = weight.values.nbytes
        if weight.form is None:
            return str(weight.dtype).removeprefix("torch."), num_bytes
        group = group_of(weight)
        return f"{weight.form} {'by output' if group >= weight.shape[-1] else f'in groups of {group}'}", num_bytes
    assert isinstance(weight, Tensor), "codes are packed or decoded before this"
    return str(weight.dtype).removeprefix("torch."), weight.nbytes
