"""Comparison of one call of a Triton kernel with its reference, on the device in SAGELLM_CHECK_DEVICE.

Operands and results are surrounded by NaN, or by an integer that no result has, so that accesses out of bounds are
detected. The references compute in float64, on the CPU.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from sageLLM.generated.kernels.reference import KERNELS as REFERENCES
from sageLLM.generated.kernels.triton import KERNELS
from sageLLM.generated.ops import OPS

DEVICE = torch.device(os.environ.get("SAGELLM_CHECK_DEVICE", "cpu"))
GUARD = 2048  # elements: more than a row of the checks, so that a store one row too far does not damage the heap
NAN_BITS = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}
NAN_BITS |= {torch.float64: 0x7FF8 << 48}
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LEAST = -128
"""The poison of integers of 8 bits, which no code of an activation is."""
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ROUNDED_LOGITS = {"lm_head", "lm_head_sample"}  # in float32, but rounded to the element type of the operands
SPECIAL = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40, 6e4, -6e4]

Results = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one call: the greatest error relative to the tolerance, and "" or another failure."""

    op: str
    kind: str
    dtype: str
    error: float
    wrong: str


class Memory:
    """Replaces torch.empty: a buffer is filled with poison and has guards on both sides.

    The poison of floating point numbers is NaN, with other bits in each buffer: a kernel that loads from one guard and
    stores to another one is detected too.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int, int]] = []
        self.empty = torch.empty

    def allocate(self, *sizes: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        count = prod(shape)
        poison = (
            NAN_BITS[dtype] + 1 + len(self.buffers)
            if dtype.is_floating_point
            else LEAST
            if dtype.itemsize == 1
            else -7777777
        )
        bits = torch.full((count + 2 * GUARD,), poison, dtype=INTEGERS[dtype.itemsize], device=device or DEVICE)
        self.buffers.append((bits, count, poison))
        return bits.view(dtype)[GUARD : GUARD + count].view(shape)

    def placed(self, x: Tensor) -> Tensor:
        """A copy of x between guards, with the strides of x."""
        room = self.allocate(x.stride(0) * x.shape[0] if x.dim() else 1, dtype=x.dtype)
        return room.as_strided(x.shape, x.stride()).copy_(x)

    def why_broken(self) -> str:
        for bits, count, poison in self.buffers:
            outside = torch.cat((bits[:GUARD], bits[GUARD + count :]))
            if not (outside == poison).all():
                return "a store out of bounds"
        return ""


def call(kernel: Callable[..., Any], operands: list[Any], attrs: Mapping[str, Any]) -> Results:
    results = kernel(*operands, **attrs)
    return results if isinstance(results, tuple) else (results,)


def triton_results(op: str, operands: list[Any], attrs: Mapping[str, Any]) -> tuple[Results, str]:
    """The results of the kernel, and whether it stored out of bounds or changed an operand."""
    memory = Memory()
    placed: list[Any] = []
    for number, x in enumerate(operands):
        whole = next((placed[i] for i in range(number) if is_part(x, operands[i])), None)
        if whole is not None:
            placed.append(whole.as_strided(x.shape, x.stride(), whole.storage_offset()))
        else:
            placed.append(None if x is None else memory.placed(x) if x.numel() else x.to(DEVICE))
    torch.empty = memory.allocate
    try:
        results = call(KERNELS[op], placed, attrs)
    finally:
        torch.empty = memory.empty
    changed = set(OPS[op].inplace.values())
    wrong = memory.why_broken()
    placed = [None if x is None else x.cpu() for x in placed]
    for name, before, after in zip(OPS[op].input_types, operands, placed, strict=False):
        if name not in changed and before is not None and not torch.equal(before.nan_to_num(), after.nan_to_num()):
            wrong = f"changes {name}"
    return tuple(x.cpu() for x in results), wrong


def is_part(x: Tensor | None, whole: Tensor | None) -> bool:
    """Whether x is the leading part of another operand, in the same memory."""
    if x is None or whole is None or x.stride() != whole.stride():
        return False
    return x.data_ptr() == whole.data_ptr() and 0 < x.numel() < whole.numel()


def exact_results(op: str, operands: list[Any], attrs: Mapping[str, Any]) -> Results:
    """The reference in float64 arithmetic, rounded wherever the spec rounds."""
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith(REFERENCES["add"].__module__.rsplit(".", 1)[0])
    ]
    widths = [(module, module.wide) for module in modules if hasattr(module, "wide")]
    for module, _ in widths:
        module.wide = lambda x: torch.float64
    try:
        return call(REFERENCES[op], [None if x is None else x.clone() for x in operands], attrs)
    finally:
        for module, wide in widths:
            module.wide = wide


def wide_results(op: str, operands: list[Any], attrs: Mapping[str, Any]) -> Results:
    """The reference on float64 operands, for kernels with another order of summation than the library."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in operands]
    return call(REFERENCES[op], [None if x is None else x.clone() for x in wide], attrs)


def by_element(found: Tensor, wanted: Tensor) -> float:
    """Error over tolerance: 1e-5 of the element plus the greatest one in float32, 2 ulp in narrow types.

    In narrow types at most 2% of the elements, and 2, may differ at all: a missing rounding moves few of them by more
    than 1 ulp, but many by 1 ulp.
    """
    target = wanted.to(found.dtype).double()
    distance = (found.double() - target).abs()
    bits = {torch.float32: 0, torch.bfloat16: 8, torch.float16: 11}[found.dtype]
    if bits == 0:
        return greatest(distance / (1e-5 * (wanted.abs() + wanted.abs().max())).clamp(min=1e-300))
    num_different = int((distance > 0).sum())
    return max(greatest(distance / (2.0 * ulp(target, bits, found.dtype))), num_different / (2 + 0.02 * found.numel()))


def greatest(x: Tensor) -> float:
    return float(x.nan_to_num(torch.inf).max())


def ulp(x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=torch.finfo(dtype).tiny)))) * 2.0 ** (1 - bits)
    ).double()


def by_greatest(found: Tensor, wanted: Tensor, dtype: str) -> float:
    """Error over tolerance for sums: 2 ulp of the greatest element, since both weights and results are rounded."""
    allowed = {"f32": 1e-5, "bf16": 2**-7, "f16": 2**-10}[dtype] * wanted.abs().max().clamp(min=1e-9)
    return float((found.double() - wanted).abs().nan_to_num(torch.inf).max() / allowed)


def compared(
    op: str, kind: str, dtype: str, operands: list[Any], attrs: Mapping[str, Any], *, is_sum: bool = False
) -> Finding:
    """Compares one call of the kernel with the reference; `is_sum` allows any order of summation."""
    try:
        found, wrong = triton_results(op, operands, attrs)
    except Exception as error:  # reported like any other finding, with the cause from the interpreter
        return Finding(op, kind, dtype, 0.0, repr(error.__cause__ or error)[:300])
    wanted = (wide_results if is_sum else exact_results)(op, operands, attrs)
    error = 0.0
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            wrong = f"expected shape {tuple(other.shape)}, got {tuple(one.shape)}"
        elif one.is_floating_point() and one.numel():
            wide = other.double()
            error = max(error, by_greatest(one, wide, dtype) if is_sum else by_element(one, wide))
            if op in ROUNDED_LOGITS and not torch.equal(one, one.to(DTYPES[dtype]).to(one.dtype)):
                wrong = f"logits are not rounded to {dtype}"
        elif not torch.equal(one, other):
            wrong = "other integers"
    return Finding(op, kind, dtype, error, wrong)


def special(op: str, operands: list[Any], attrs: Mapping[str, Any], dtype: str) -> Finding:
    """Compares infinities, NaN, zeros and subnormal numbers with the results of torch."""
    for x in operands:
        if x.is_floating_point() and x.numel() >= len(SPECIAL):
            x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL).to(x.dtype)
    found, wrong = triton_results(op, operands, attrs)
    for one, other in zip(found, call(REFERENCES[op], operands, attrs), strict=True):
        if one.is_floating_point() and not torch.allclose(one.double(), other.double(), 2e-2, 1e-5, equal_nan=True):
            wrong = "other special values"
    return Finding(op, "special values", dtype, 0.0, wrong)
