"""Pipeline stages in processes: answers equal those of one process, alone and with tensor parallelism."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from random import Random

import pytest

from sageLLM import LLM
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.errors import CheckpointError
from tests.engine.test_async_scheduling import assert_same as assert_same_answers
from tests.engine.test_async_scheduling import load as load_small
from tests.engine.test_async_scheduling import requests, serve

from .test_processes import PARAMS, PROMPTS, after_tokens, assert_ended, assert_same, load, process_ids


@pytest.fixture(scope="module")
def expected() -> list[RequestOutput]:
    return load().generate(PROMPTS, PARAMS)


@pytest.fixture(scope="module")
def stages() -> Iterator[LLM]:
    llm = load_small("hybrid", async_scheduling=True, pipeline_parallel_size=2, num_kv_blocks=40, swap_space=0.01)
    yield llm
    ids = process_ids(llm)
    llm.close()
    assert_ended(ids)


def test_two_stages_of_two_ranks_in_strict_mode(expected: list[RequestOutput]) -> None:
    llm = load("strict", pipeline_parallel_size=2, tensor_parallel_size=2)
    assert_same(llm.generate(PROMPTS, PARAMS), expected)
    ids = process_ids(llm)
    assert len(ids) == 4
    del llm
    assert_ended(ids)


def test_stages_in_micro_batches(expected: list[RequestOutput]) -> None:
    """A stage receives the rows of each micro-batch by themselves, into a part of one buffer."""
    llm = load("time_share", pipeline_parallel_size=2, num_ubatches=3)
    assert_same(llm.generate(PROMPTS, PARAMS), expected)
    ids = process_ids(llm)
    llm.close()
    assert_ended(ids)


def test_random_traffic_with_preemption(stages: LLM) -> None:
    """Prefixes, chunks, forks, stop rules, aborts and swapping, in a pool that is too small."""
    alone = load_small("hybrid", async_scheduling=False)
    for seed in range(3):
        made = requests(Random(seed), 14)
        found = serve(stages, Random(seed), made)
        expected = serve(alone, Random(seed + 100), made)
        both = found.keys() & expected.keys()
        assert len(both) > 5
        for name in both:
            assert_same_answers(found[name], expected[name])
    assert stages.engine.scheduler.get_stats()["total_swaps"] > 0


def test_a_killed_stage_costs_no_request(stages: LLM) -> None:
    expected = stages.generate(PROMPTS, PARAMS)
    before = process_ids(stages)
    found = after_tokens(stages, 20, lambda: os.kill(before[0], signal.SIGKILL))
    assert_same(found, expected)
    assert not set(before) & set(process_ids(stages))
    assert_ended(before)
    stages.engine.scheduler.check_integrity()


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tiny.*: pipeline_parallel_size=9 is more than the 4 layers of llama"):
        load(pipeline_parallel_size=9)
