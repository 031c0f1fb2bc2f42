"""Attention-FFN disaggregation in processes: answers equal those of one process, and a lost FFN worker costs a step.

`af_matrix.py` runs more numbers of workers, modes, layouts and losses.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.engine_group import EngineGroup
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.loader.model import load_model
from sageLLM.runtime.registry.plugins import load_registry

from .test_processes import MODEL, PARAMS, PROMPTS, assert_ended, assert_same, load, process_ids, tokens

SHORT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=80, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def expected() -> list[RequestOutput]:
    return load().generate(PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def disaggregated() -> Iterator[LLM]:
    """Two attention workers and one FFN worker, with two micro-batches."""
    llm = load(af="2:1", num_ubatches=2)
    yield llm
    ids = [*ffn_ids(llm), *attention_ids(llm)]
    llm.close()
    assert_ended(ids)


def ffn_ids(llm: LLM) -> list[int]:
    assert llm._ffn_workers is not None
    return llm._ffn_workers.process_ids


def attention_ids(llm: LLM) -> list[int]:
    engine = llm.engine
    engines = engine.engines if isinstance(engine, EngineGroup) else [engine]
    return [pid for one in engines for pid in one.executor.process_ids]  # type: ignore[attr-defined]


def test_answers_are_those_of_one_process(disaggregated: LLM, expected: list[RequestOutput]) -> None:
    assert_same(disaggregated.generate(PROMPTS, PARAMS), expected)
    engine = disaggregated.engine
    assert isinstance(engine, EngineGroup)
    assert all(one.num_steps > 0 for one in engine.engines), "the requests are divided"


def test_an_attention_worker_without_requests_keeps_no_other_waiting(
    disaggregated: LLM, expected: list[RequestOutput]
) -> None:
    (output,) = disaggregated.generate(PROMPTS[:1], PARAMS[0])
    assert output.outputs[0].token_ids == expected[0].outputs[0].token_ids


def test_the_interface_of_the_server(disaggregated: LLM, expected: list[RequestOutput]) -> None:
    """Steps without text, one answer that is aborted, and the sums of the schedulers' counters."""
    engine = disaggregated.engine
    groups = [engine.prepare(f"s{i}", None, PROMPTS[i], PARAMS[0]) for i in range(2)]
    for group in groups:
        engine.submit(group)
    assert engine.scheduler_stats()["num_waiting"] == 2
    engine.abort_answer("s1", 0, "not wanted")
    while engine.has_work:
        engine.step_answers()
    assert [group.is_finished for group in groups] == [True, True]
    assert groups[0].output().outputs[0].token_ids == expected[0].outputs[0].token_ids
    assert groups[1].output().outputs[0].finish_reason == "abort"


def test_a_killed_ffn_worker_costs_a_step_and_no_request(disaggregated: LLM) -> None:
    """The attention workers stay, with the KV of their requests: nothing is prefilled again."""
    reference = load().generate(PROMPTS, LONG)
    before, attention = ffn_ids(disaggregated), attention_ids(disaggregated)
    killed = 0
    found: dict[str, RequestOutput] = {}
    for output in disaggregated.stream(PROMPTS, LONG):
        found[output.request_id] = output
        if not killed and len(output.outputs[0].token_ids) > 10:
            os.kill(before[0], signal.SIGKILL)
            killed += 1
    answers = [found[name].outputs[0] for name in sorted(found, key=int)]
    assert [answer.token_ids for answer in answers] == [output.outputs[0].token_ids for output in reference]
    assert killed and ffn_ids(disaggregated) != before
    assert disaggregated._ffn_workers is not None and disaggregated._ffn_workers.num_restarts == 1
    assert attention_ids(disaggregated) == attention


def test_a_killed_attention_worker_is_replaced(disaggregated: LLM) -> None:
    reference = load().generate(PROMPTS, LONG)
    attention = attention_ids(disaggregated)
    timer = threading.Timer(0.1, os.kill, (attention[0], signal.SIGKILL))
    timer.start()
    assert tokens(disaggregated.generate(PROMPTS, LONG)) == tokens(reference)
    timer.join()
    assert tokens(disaggregated.generate(PROMPTS, LONG)) == tokens(reference)
    assert attention_ids(disaggregated) != attention


def test_experts_over_sockets_with_more_ffn_workers(make_checkpoint: Callable[..., Path]) -> None:
    """The references have no rings, so rows travel over sockets; two groups of FFN workers require two micro-batches.

    The workers of a group have half of the experts each. All end when the `LLM` is garbage.
    """
    folder = make_checkpoint("Mixtral", vocab_size=200)
    options: dict[str, Any] = {"dtype": "float32", "skip_tokenizer": True, "kernels": "reference"}
    config = PDSchedulerConfig(mode="strict")
    alone = LLM(folder, scheduler=config, **options).generate(PROMPTS, SHORT)
    llm = LLM(folder, scheduler=config, af="1:2x2", enable_expert_parallel=True, **options)
    ids = [*ffn_ids(llm), *process_ids(llm)]
    assert tokens(llm.generate(PROMPTS, SHORT)) == tokens(alone)
    del llm
    assert_ended(ids)


def test_each_role_reads_its_weights() -> None:
    registry = load_registry()
    read = {}
    for role in ("attention", "ffn", None):
        options: dict[str, Any] = {"dtype": "float32", "device": _cpu(), "max_model_len": None, "role": role}
        read[role] = load_model(MODEL, registry, **options).weights.keys()
    assert read["attention"] | read["ffn"] == read[None]
    assert not read["attention"] & read["ffn"]
    assert {name.split(".")[2] for name in read["ffn"]} == {"ffn"}


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


@pytest.mark.parametrize("af", ["", "2", "0:1", "1:0", "2:1:1", "a:b", "65:1", 2, "-1:1", "1:1x0", "1:33x2"])
def test_the_numbers_of_workers_are_checked(af: Any) -> None:
    with pytest.raises(SageError, match="af must be the numbers of attention and FFN workers, such as '2:1'"):
        LLM(MODEL, af=af)


def test_combinations_that_do_not_run_are_refused() -> None:
    with pytest.raises(SageError, match="af must not be combined with tensor_parallel_size"):
        LLM(MODEL, af="1:1", tensor_parallel_size=2)
    with pytest.raises(SageError, match="distributed_executor_backend must be 'mp' for 2 ranks"):
        LLM(MODEL, af="1:1", distributed_executor_backend="uni")
    with pytest.raises(SageError, match="num_ubatches must be at most 16 with 1 FFN workers, got 17"):
        LLM(MODEL, af="1:1", num_ubatches=17)
    with pytest.raises(SageError, match="af must not be combined with weights_tier='disk'"):
        LLM(MODEL, af="1:1", weights_tier="disk")
