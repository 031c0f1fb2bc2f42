"""Launchers of Triton kernels call nothing else of torch: in a step every other kernel would be a launch more."""

from collections import Counter
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .recorded_device import FREE
from .stubbed_triton import recorded_compilations

VIEWS = FREE | {"aten::empty.memory_format", "aten::empty_like", "aten::_unsafe_view"}
"""Calls that launch nothing: they allocate, or make views."""
OF_EXPERTS = ("topk_router", "expert_linear", "expert_down", "combine_experts", "router_logits")


class OtherCalls(TorchDispatchMode):
    """Counts the calls of torch, but for those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += func.name() not in VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
@pytest.mark.parametrize("rows", [1, 32, 4096])
def test_launchers_call_nothing_but_their_kernels(rows: int) -> None:
    """At the sizes of a model of 8B parameters; experts with a routing table, which is a kernel, and without one."""
    from ..kernels.triton import compile_ahead

    sizes, found = compile_ahead.SIZES | dict.fromkeys("RST", rows), {}
    for name in OF_EXPERTS if rows > 32 else compile_ahead.KERNELS:
        operands = compile_ahead.operands(name, sizes, torch.bfloat16)
        with recorded_compilations() as compiled:
            for _ in range(2):  # the first call may allocate what later ones share, such as counters
                with OtherCalls() as calls:
                    compile_ahead.KERNELS[name](*operands, **compile_ahead.attrs(name, sizes))
        assert compiled, name
        if calls.counts.total():
            found[name] = dict(calls.counts)
    assert found == {}
