"""Gates that open when a step has computed a layer: the order of a step, its layers, and failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.executor.native.layer_progress import END_ORDER
from sageLLM.runtime.executor.native.plan import Inputs, NativePlan
from sageLLM.runtime.worker.executor import InProcessExecutor
from sageLLM.runtime.worker.step_gate import StepCounter

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"


class Layers:
    """Layers below `num_complete` are complete."""

    def __init__(self) -> None:
        self.num_complete = 0
        self.is_watched = False

    def watch_layers(self) -> None:
        self.is_watched = True

    def begin_step(self) -> None:
        self.num_complete = 0

    def is_complete(self, layer: int) -> bool:
        return layer < self.num_complete


def test_a_gate_opens_with_the_layers_of_its_order() -> None:
    layers = Layers()
    counter = StepCounter(layers)
    counter.begin()
    first, second = counter.gate(1), counter.gate(2)
    assert layers.is_watched and first.wait(0, 0.0) is None
    layers.num_complete = 1
    assert (first.wait(0, 0.0), first.wait(1, 0.0), second.wait(0, 0.0)) == (True, None, None)
    counter.end()
    assert (first.wait(1, 0.0), second.wait(0, 0.0)) == (True, None)
    counter.begin()
    assert second.wait(0, 0.0) is None
    counter.has_failed = True
    assert (second.wait(0, 0.0), first.wait(1, 0.0)) == (False, True)


def test_a_plan_reports_the_layers_whose_calls_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(MODEL, dtype="float32", max_model_len=64)
    executor = llm.engine.executor
    assert isinstance(executor, InProcessExecutor)
    runner = executor.decoder.runner
    plan, layers = runner.plan("prefill"), range(runner.model.config.L)
    assert isinstance(plan, NativePlan)
    progress = plan.watch_layers().progress
    assert progress is not None
    last_calls = [progress._last_call[layer] for layer in layers]
    assert last_calls == sorted(set(last_calls))
    for layer in layers:
        assert not progress.is_complete(layer)
        progress._stamps[: last_calls[layer] + 1, END_ORDER] = 1  # as the runner writes them
        assert [progress.is_complete(one) for one in layers] == [one <= layer for one in layers]

    seen: list[bool] = []
    run = NativePlan.run

    def watched(self: NativePlan, inputs: Inputs) -> list[torch.Tensor]:
        seen.append(any(map(runner.is_complete, layers)))
        outputs = run(self, inputs)
        seen.append(all(map(runner.is_complete, layers)))
        return outputs

    monkeypatch.setattr(NativePlan, "run", watched)
    runner.watch_layers()
    runner.begin_step()
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
    assert seen == [False, True, False, False]  # the second run belongs to no step that has begun
