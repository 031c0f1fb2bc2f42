"""Experts divided over ranks: the rows of the ranks add up to those of one process, and other rows are zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM.generated.kernels import reference
from sageLLM.runtime.kernels.cpu.compiler import find_compiler

from .native import native

T, A, X, K, N, RANKS = 11, 3, 6, 40, 24, 2


def kernel(target: str, op: str) -> Callable[..., Any]:
    if target == "cpu" and find_compiler() is None:
        pytest.skip("no C++ compiler")
    found: Callable[..., Any] = reference.KERNELS[op] if target == "reference" else native(op)
    return found


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("op", ["expert_linear", "expert_down"])
def test_ranks_with_whole_experts_add_up(op: str, target: str) -> None:
    linear, local_experts = kernel(target, op), kernel(target, "local_experts")
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, w, bias = drawn(T, K) if op == "expert_linear" else drawn(T, A, K), drawn(X, N, K), drawn(X, N)
    experts = torch.randint(X, (T, A), generator=generator, dtype=torch.int32)
    experts[0] = 1  # all of rank 0
    whole = linear(x, experts, w, bias)
    share = X // RANKS
    total = torch.zeros_like(whole)
    for rank in range(RANKS):
        held = slice(rank * share, (rank + 1) * share)
        local = local_experts(experts, X=share, first=rank * share)
        is_held = (experts >= held.start) & (experts < held.stop)
        assert torch.equal(local, torch.where(is_held, experts - held.start, share))
        rows = linear(x, local, w[held].contiguous(), bias[held].contiguous())
        assert not rows[~is_held].any()
        total += rows
    assert torch.equal(total, whole)
