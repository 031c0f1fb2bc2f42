"""Steps in micro-batches: the answers are those of whole steps, in every mode, with prefix hits, chunks and forks."""

from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.errors import SageError

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
PROMPTS = [[10, 11, 12], [20, 21], [30 + i for i in range(40)], [10, 11, 13], [30 + i for i in range(38)]]
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
FORKED = SamplingParams(max_tokens=16, n=2, temperature=1.0, seed=3, logprobs=2, ignore_eos=True)


def answers(mode: str = "hybrid", **options: Any) -> list[tuple[int, ...]]:
    """The second call has hits in the prefix cache, and sequences that share blocks."""
    config = PDSchedulerConfig(mode=mode, prefill_chunk_size=16)
    llm = LLM(MODEL, dtype="float32", max_model_len=128, scheduler=config, **options)
    try:
        outputs = [output for params in (GREEDY, FORKED) for output in llm.generate(PROMPTS, params)]
        assert any(output.num_cached_tokens for output in outputs)
    finally:
        llm.close()
    return [answer.token_ids for output in outputs for answer in output.outputs]


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, ...]]:
    return answers()


@pytest.mark.parametrize(("mode", "num_ubatches"), [("hybrid", 2), ("strict", 3), ("time_share", 4)])
def test_micro_batches_give_the_same_tokens(mode: str, num_ubatches: int, expected: list[tuple[int, ...]]) -> None:
    assert answers(mode, num_ubatches=num_ubatches) == expected


def test_references_and_two_ranks(expected: list[tuple[int, ...]]) -> None:
    assert answers(num_ubatches=2, kernels="reference") == expected
    assert answers(num_ubatches=2, tensor_parallel_size=2) == expected


@pytest.mark.parametrize("num_ubatches", [0, -1, True, "2"])
def test_the_number_is_checked(num_ubatches: Any) -> None:
    with pytest.raises(SageError, match="num_ubatches must be an integer of at least 1"):
        LLM(MODEL, num_ubatches=num_ubatches)
