"""Kernels between guards, for tests: stores out of bounds, changed operands and races end the step with an error.

With SAGELLM_RED_ZONES=1 in the environment every kernel call runs twice, and its memory, the KV caches included, has
guards on both sides that are checked after the call. Steps are slow, and no CUDA graph is captured.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.errors import SageError

GUARD = 1 << 16
"""Bytes of a guard: more than a row, so that a store one row too far does not damage other memory."""
PATTERN = 0xFF
"""A fill byte that reads as NaN in every float type: loads out of bounds show in results."""
MAGIC = b"sagellm red zone"
"""The first bytes of memory with guards."""
ALLOCATING = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_enabled() -> bool:
    return os.environ.get("SAGELLM_RED_ZONES") == "1"


def guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device, fill: int = PATTERN) -> Tensor:
    """A tensor between guards, filled with a byte."""
    num_bytes = prod(shape) * dtype.itemsize
    memory = torch.full((2 * GUARD + num_bytes,), PATTERN, dtype=torch.uint8, device=device)
    own = memory[GUARD : GUARD + num_bytes]
    own.fill_(fill)
    memory[: len(MAGIC)] = torch.tensor(list(MAGIC), dtype=torch.uint8)
    return own.view(dtype).view(*shape)


def is_damaged(x: Tensor) -> bool:
    """Whether a guard has changed; False for a tensor without guards."""
    memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    if bytes(memory[: len(MAGIC)].tolist()) != MAGIC:
        return False
    before, after = memory[len(MAGIC) : GUARD], memory[len(memory) - GUARD :]
    return bool((before != PATTERN).any()) or bool((after != PATTERN).any())


class GuardedMemory(TorchFunctionMode):
    """Replaces the memory that launchers allocate by guarded memory, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in ALLOCATING or result.is_meta or not result.is_contiguous():
            return result
        replaced = guarded(result.shape, result.dtype, result.device)
        self.made.append(replaced)
        return replaced


class CheckedKernel:
    """A kernel with checks of each call. Collectives run once, because all ranks take part in them."""

    def __init__(self, op: type[OpNode], kernel: Kernel) -> None:
        self.op, self._kernel = op.op, kernel
        self._runs_once = not {"collective", "p2p"}.isdisjoint(op.tags)
        self._caches = set(op.inplace.values())
        self._names = list(op.input_types)

    def __call__(self, *operands: Any, **attrs: Any) -> Any:
        read = {name: x for name, x in zip(self._names, operands, strict=False) if isinstance(x, Tensor)}
        kept = {name: x.clone() for name, x in read.items() if x.dtype == torch.int32 and name not in self._caches}
        memory = GuardedMemory()
        with memory:
            results = self._kernel(*operands, **attrs)
        self._check_guards([*memory.made, *read.values()])
        for name, x in kept.items():
            if not torch.equal(x, read[name]):
                raise SageError(f"{self.op} must not change its operand {name!r}: a store out of bounds")
        if not self._runs_once:
            with GuardedMemory():
                again = self._kernel(*operands, **attrs)
            self._check_same(results, again)
        return results

    def _check_guards(self, tensors: Sequence[Tensor]) -> None:
        for x in tensors:
            if is_damaged(x):
                raise SageError(f"{self.op} must store within its memory, got a store next to {x.dtype}{list(x.shape)}")

    def _check_same(self, first: Any, second: Any) -> None:
        pairs = zip(_tensors(first), _tensors(second), strict=True)
        if not all(torch.equal(bits(x), bits(y)) for x, y in pairs):
            raise SageError(f"{self.op} must return the same bits for the same operands: its programs race")


def bits(x: Tensor) -> Tensor:
    """The elements as integers, so that NaN equals itself."""
    return x.contiguous().view(BITS[x.element_size()])


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def checked(kernels: Mapping[str, Kernel], ops: Mapping[str, type[OpNode]]) -> dict[str, Kernel]:
    return {name: CheckedKernel(ops[name], kernel) for name, kernel in kernels.items()}


def require_unit_strides(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A Triton launcher that refuses operands with a last dim that is not contiguous, which its kernels assume."""
    if ".kernels.triton" not in getattr(kernel, "__module__", ""):
        return kernel

    def call(*operands: Any, **attrs: Any) -> Any:
        for number, x in enumerate(operands):
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
                raise SageError(
                    f"{kernel.__name__}: the last dim of operand {number} must be contiguous, got strides "
                    f"{x.stride()} for {list(x.shape)}"
                )
        return kernel(*operands, **attrs)

    return call
