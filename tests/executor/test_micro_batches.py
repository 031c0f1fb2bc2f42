"""Steps in micro-batches compared with whole steps: logits, tokens and caches."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.core.passes.check import verify_schedule
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.native import NativeRunner
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.worker.micro_batch_inputs import MicroBatchInputs
from sageLLM.runtime.worker.sequences import DecodeBatch, SequenceChunk, WorkerSequence
from sageLLM.runtime.worker.step_inputs import StepInputs

from .conftest import BLOCK_SIZE, MAX_LEN

KERNELS = load_registry().kernels
LAYOUTS = {"llama": 2, "gemma3": 3, "gpt2": 4, "bloom": 2, "qwen2_moe": 3, "deepseek_v3": 2, "gpt_oss": 2, "falcon": 3}
"""Layouts with different attention, positions and experts, and the micro-batches in which each runs."""
Step = tuple[Stage, list[WorkerSequence], list[SequenceChunk], list[int]]


def steps() -> Sequence[Step]:
    """A prompt, its rest with another prompt, a hybrid step, and a decode; parts begin and end within chunks."""
    one = WorkerSequence("one", [5, 6, 7, 8, 9], [3], block_ids=[2, 3, 11])
    two = WorkerSequence("two", [*range(1, 10)], block_ids=[0, 1, 4])
    three = WorkerSequence("three", [*range(20, 45)], block_ids=[5, 6, 7, 8, 9, 10, 2])
    return [
        ("prefill", [], [SequenceChunk(two, 0, 5)], [4]),
        ("prefill", [], [SequenceChunk(two, 5, 4), SequenceChunk(three, 0, 25)], [3, 28]),
        ("hybrid", [one, three], [SequenceChunk(two, 2, 7)], [0, 1, 8]),
        ("decode", [one, two, three, one], [], [0, 1, 2, 3]),
    ]


def run(tiny: Any, num_parts: int, make_plan: Any) -> list[list[Tensor]]:
    """The outputs and the caches after each step."""
    bound, plans, found = tiny.bound(), {}, []
    whole = StepInputs(BLOCK_SIZE, MAX_LEN // BLOCK_SIZE, tiny.tables)
    parts = MicroBatchInputs(num_parts)
    for stage, decodes, chunks, rows in steps():
        if stage not in plans:
            plans[stage] = make_plan(tiny.compiler.kernel_graph(stage, num_parts), bound)
        inputs = whole.make(DecodeBatch(decodes), chunks, rows)
        if num_parts > 1:
            inputs = parts.divide(inputs, len(decodes), chunks)
        caches = [name for name in bound if name.endswith("_cache")]
        found.append([*(x.clone() for x in plans[stage].run(inputs)), *(bound[name].clone() for name in caches)])
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_micro_batches_compute_the_same(name: str, make_tiny: Any) -> None:
    tiny = make_tiny(name, "f32")
    for stage in ("prefill", "hybrid", "decode"):
        graph = tiny.compiler.kernel_graph(stage, LAYOUTS[name])
        verify(graph)
        verify_schedule(graph)
    with torch.inference_mode():
        reference, found = (run(tiny, num, lambda g, b: Plan(g, KERNELS, b)) for num in (1, LAYOUTS[name]))
    for step, expected in zip(found, reference, strict=True):
        for x, y in zip(step, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_native_plans_of_micro_batches(name: str, make_tiny: Any, runner: NativeRunner) -> None:
    """Over shared and poisoned memory."""
    tiny = make_tiny(name, "f32")

    def native(graph: Any, bound: Any) -> NativePlan:
        plan = NativePlan(graph, runner, KERNELS, bound, poison=True)
        assert not plan.python_calls
        return plan

    with torch.inference_mode():
        reference, found = (run(tiny, num, native) for num in (1, LAYOUTS[name]))
    for step, expected in zip(found, reference, strict=True):
        for x, y in zip(step, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
