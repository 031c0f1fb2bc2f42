"""Weights by form: the kernels that read them, and the reasons for quantised weights that are dequantised."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.executor.planner import Planner
from sageLLM.runtime.kernels.coded_tensor import CodedTensor
from sageLLM.runtime.kernels.cpu.coded import group_of
from sageLLM.runtime.kernels.cpu.packing import PackedWeight
from sageLLM.runtime.kernels.int8_activations import ACTIVATION_FORMS, Int8Weight


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
    weights: Mapping[str, Weight],
    ties: Mapping[str, str],
    planner: Planner,
    reasons: Mapping[str, str],
    declared: str | None = None,
) -> list[WeightStats]:
    """The matrices of a model by form, after `Planner.prepare_weights`. A tied weight counts once.

    `reasons` are those of weights that were dequantised when they were loaded, and `declared` is the type of
    activations in the settings of the checkpoint.
    """
    native = {one.native for one in weights.values() if isinstance(one, PackedWeight)}
    coded = {one.form for one in weights.values() if isinstance(one, CodedTensor)}
    kernels = planner.gemm_kernels(native | coded)
    rounds = any(isinstance(one, PackedWeight) and one.activations is not None for one in weights.values())
    found: dict[tuple[str, str, str | None], WeightStats] = {}
    for name, weight in weights.items():
        if name in ties or len(weight.shape) < 2:
            continue
        form, num_bytes = _form(weight)
        kernel = "not packed"
        if isinstance(weight, PackedWeight):
            kernel = kernels.get(weight.native, "")
        elif isinstance(weight, CodedTensor):
            kernel = kernels.get(weight.form, "")
        if isinstance(weight, PackedWeight) and weight.form is not None:
            kernel += _activations(weight, declared, rounds=rounds)
        elif isinstance(weight, Int8Weight):
            kernel += ", activations in int8"
        one = WeightStats(form, kernel, 0, 0, reasons.get(name))
        key = form, kernel, one.reason
        held = found.get(key, one)
        found[key] = replace(held, num_weights=held.num_weights + 1, num_bytes=held.num_bytes + num_bytes)
    return list(found.values())


def _activations(weight: PackedWeight, declared: str | None, *, rounds: bool) -> str:
    """The activations that codes are multiplied with, if they are not those that a reader expects."""
    if weight.activations is not None:
        return f", activations in {weight.activations}"
    own = f", activations in {str(weight.dtype).removeprefix('torch.')}"
    if rounds:
        return f"{own}, as its codes are not integers"
    if declared is not None:
        remedy = f": activation_dtype={declared!r} rounds them" if declared in ACTIVATION_FORMS else ""
        return f"{own}, although the checkpoint declares {declared}{remedy}"
    return ""


def _form(weight: Weight) -> tuple[str, int]:
    if isinstance(weight, PackedWeight):
        num_bytes = weight.values.nbytes
        if weight.form is None:
            return str(weight.dtype).removeprefix("torch."), num_bytes
        return _coded_form(weight.form, group_of(weight), weight.shape[-1]), num_bytes
    if isinstance(weight, CodedTensor):
        return _coded_form(weight.form, weight.code_layout.group, weight.shape[-1]), weight.num_bytes
    assert isinstance(weight, Tensor), "codes are packed or decoded before this"
    return str(weight.dtype).removeprefix("torch."), weight.nbytes


def _coded_form(form: str, group: int, inner: int) -> str:
    return f"{form} {'by output' if group >= inner else f'in groups of {group}'}"
