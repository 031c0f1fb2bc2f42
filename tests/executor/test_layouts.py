"""Native plans of every layout compared with plans in Python: locations, memory and kernels."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.kernels import NativeKernel
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.native.plan import NativePlan, Runner
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.native import NativeRunner
from sageLLM.runtime.registry.plugins import load_registry

REGISTRY = load_registry()
LAYOUTS = [name for name, layout in MODELS.items() if layout.generates]
TOLERANCES = {"f32": 2e-5, "bf16": 4e-2}


class NoKernels:
    """A runner without native functions, so that every node runs in Python."""

    kernels: Mapping[str, NativeKernel] = {}
    copy_address = poison_address = 0
    library = None

    def why_not(self, op: str, element: str | None, attrs: Mapping[str, Any]) -> str | None:
        raise AssertionError("only called for ops with a kernel")

    def address(self, op: str, element: str | None, *, unpacks: bool = False, form: str | None = None) -> int:
        raise AssertionError("only called for ops with a kernel")

    def run(self, calls: int, first: int, end: int, num_streams: int, stamps: int = 0) -> None:
        raise AssertionError("only called for native calls")


def both_ways(tiny: Any, runner: Runner) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The outputs and caches after every step, of the native plans and of the plans in Python."""
    bound, expected = tiny.bound(), tiny.bound()
    arena, natives, plains, found = Arena(), {}, {}, []
    for stage, inputs in tiny.steps():
        graph = tiny.compiler.kernel_graph(stage)
        if stage not in natives:
            natives[stage] = NativePlan(graph, runner, REGISTRY.kernels, bound, arena, poison=True)
            plains[stage] = Plan(graph, REGISTRY.kernels, expected)
        caches = [name for name in bound if name.endswith("_cache")]
        reference = [*plains[stage].run(inputs), *(expected[name].clone() for name in caches)]
        found.append(
            ([*(x.clone() for x in natives[stage].run(inputs)), *(bound[name].clone() for name in caches)], reference)
        )
    return found


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_locations_and_memory(name: str, dtype: str, make_tiny: Any) -> None:
    """On the same kernels the results are equal bit for bit, although memory is shared and poisoned."""
    with torch.inference_mode():
        for found, reference in both_ways(make_tiny(name, dtype), NoKernels()):
            assert all(torch.equal(x, y) for x, y in zip(found, reference, strict=True))


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_native_kernels(name: str, dtype: str, make_tiny: Any, runner: NativeRunner) -> None:
    bound = TOLERANCES[dtype]
    with torch.inference_mode():
        for found, reference in both_ways(make_tiny(name, dtype), runner):
            (logits, tokens, *caches), (logits_reference, tokens_reference, *caches_reference) = found, reference
            for x, y in zip([logits, *caches], [logits_reference, *caches_reference], strict=True):
                largest = float(y.abs().max()) if y.numel() else 0.0
                torch.testing.assert_close(x, y, rtol=bound, atol=bound * largest)
            if dtype == "f32":
                assert torch.equal(tokens, tokens_reference)
