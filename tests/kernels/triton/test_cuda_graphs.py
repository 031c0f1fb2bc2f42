"""Padding of decode steps to the shapes of CUDA graphs; the graphs themselves require a GPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.executor.cuda_graphs import pad_inputs, round_up
from sageLLM.runtime.executor.torch_plan import Plan

MODEL = Path(__file__).parents[3] / "examples/tiny_python_model"
PROMPTS = ["def __init__(self", "import os\nimport ", "x = "]


def test_sizes_are_rounded_up_to_powers_of_2() -> None:
    assert [round_up(count) for count in (1, 2, 3, 8, 9, 200)] == [1, 2, 4, 8, 16, 256]


def test_padded_steps_return_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole engine on steps of 8 rows instead of 3: the padding rows repeat the third one."""

    def completed() -> list[list[int]]:
        llm = LLM(model=MODEL, kernels="reference")
        params = SamplingParams(max_tokens=12, temperature=0.0)
        return [request.outputs[0].token_ids for request in llm.generate(PROMPTS, params)]

    def run_filled(plan: Plan, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        given = {name: x for name, x in inputs.items() if x is not None}
        num_rows, width = given["block_table"].shape
        if plan.graph.stage != "decode":
            return run(plan, inputs)
        padded = pad_inputs(given, 8, round_up(width + 1))
        assert {len(x) for name, x in padded.items() if name != "q_start"} == {8}
        steps.append(num_rows)
        return [x[:num_rows] for x in run(plan, padded)]

    wanted, run, steps = completed(), Plan.run, list[int]()
    monkeypatch.setattr(Plan, "run", run_filled)
    assert completed() == wanted
    assert 3 in steps
