"""Sampling from shares of the vocabulary, by threads as ranks, compared with the sampler of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sageLLM.runtime.sampling import shared_sampler
from sageLLM.runtime.sampling.logprobs import score_tokens
from sageLLM.runtime.sampling.sampler import SampledTokens, SamplingBatch, SequenceSampling, sample
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.sampling.share import Share, top_tokens
from sageLLM.runtime.sampling.shared_sampler import sample_shared

T = TypeVar("T")
THREADS = ThreadPoolExecutor(4)


class Meeting:
    """The ranks of a group: threads that meet to exchange tensors."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.widths: list[int] = []
        self._barrier = threading.Barrier(num_ranks)
        self._parts: list[Tensor] = [torch.empty(0)] * num_ranks

    def run(self, logits: Tensor, body: Callable[[Tensor, Share], T]) -> T:
        """The result of all ranks, each with its columns of the logits, and padding after the last ones."""
        width = -(-logits.shape[1] // self.num_ranks) + 3
        padded = torch.nn.functional.pad(logits, (0, width * self.num_ranks - logits.shape[1]), value=torch.nan)
        tasks = [
            THREADS.submit(self._one, rank, padded, width, logits.shape[1], body) for rank in range(self.num_ranks)
        ]
        first, *others = [task.result(60) for task in tasks]
        assert all(repr(other) == repr(first) for other in others)
        return first

    def _one(self, rank: int, padded: Tensor, width: int, vocab_size: int, body: Callable[[Tensor, Share], T]) -> T:
        def gather(x: Tensor) -> Tensor:
            self._parts[rank] = x
            if rank == 0:
                self.widths.append(x.shape[1])
            self._barrier.wait(30)
            found = torch.stack(self._parts)
            self._barrier.wait(30)
            return found

        try:
            first = min(rank * width, vocab_size)
            count = min(width, vocab_size - first)
            share = Share(first, count, vocab_size, self.num_ranks, gather)
            return body(padded[:, rank * width : (rank + 1) * width], share)
        except BaseException:
            self._barrier.abort()
            raise


def sampled(logits: Tensor, sequences: list[SequenceSampling], num_ranks: int) -> tuple[SampledTokens, list[int]]:
    meeting = Meeting(num_ranks)
    found = meeting.run(logits, lambda share_of, share: sample_shared(share_of, SamplingBatch(sequences), share))
    return found, meeting.widths


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 12, 40]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    seed=st.integers(0, 1000),
    logprobs=st.sampled_from([None, 0, 1, 5, 20]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([None, {1: 3.0, 30: -2.0, 44: 50.0}]),
    min_tokens=st.sampled_from([0, 5]),
    max_tokens=st.just(8),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(parameters, min_size=1, max_size=5),
    st.integers(1, 4),
    st.sampled_from([45, 200]),
    st.integers(0, 2**31),
    st.sampled_from([0.05, 1.0, 4.0]),
    st.booleans(),
    st.sampled_from([1, 8, 256]),
)
def test_tokens_and_logprobs_are_those_of_one_process(params, num_ranks, vocab, seed, scale, has_ties, candidates):
    """All parameters, flat and sharp logits, ties, and more or fewer candidates than the filters keep."""
    logits = torch.randn(len(params), vocab, generator=torch.Generator().manual_seed(seed)) * scale
    logits = (logits * 4).round() / 4 if has_ties else logits
    sequences = [SequenceSampling(one, [1, 2, vocab - 1], [2, 7, 7], stop_ids=(3, vocab - 2)) for one in params]
    expected = sample(logits, SamplingBatch(sequences))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_sampler, "NUM_CANDIDATES", candidates)
        patch.setattr(shared_sampler, "MAX_CANDIDATES", 12)
        found, _ = sampled(logits, sequences, num_ranks)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert found.logprobs == expected.logprobs
    assert found.failed == expected.failed


LARGE = 20_000


@pytest.mark.parametrize(
    ("params", "is_whole"),
    [
        (SamplingParams(seed=1, temperature=1.0), False),
        (SamplingParams(seed=1, top_k=50, top_p=0.9), False),
        (SamplingParams(seed=1, min_p=0.1, logprobs=3), False),
        (SamplingParams(seed=1, top_p=0.9, temperature=0.2), False),
        (SamplingParams(seed=1, top_p=0.9, temperature=5.0), True),
        (SamplingParams(seed=1, top_k=2000), True),
        (SamplingParams(temperature=0.0, logprobs=0, presence_penalty=0.1), False),
    ],
)
def test_only_rows_with_wide_filters_are_gathered(params, is_whole):
    logits = torch.randn(3, LARGE, generator=torch.Generator().manual_seed(5)) * 4
    sequences = [SequenceSampling(params, [0], [1] * i) for i in range(3)]
    found, widths = sampled(logits, sequences, 2)
    assert found.token_ids.tolist() == sample(logits, SamplingBatch(sequences)).token_ids.tolist()
    assert (max(widths) >= 4 * LARGE / 2) == is_whole
    assert is_whole or sum(widths) < 4 * LARGE / 4


def test_rows_without_a_finite_maximum_fail_on_all_ranks():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    logits[0, 29], logits[1], logits[2, 2] = torch.nan, -torch.inf, torch.inf
    sequences = [SequenceSampling(SamplingParams(seed=1, top_k=3), [0]) for _ in range(4)]
    assert sampled(logits, sequences, 3)[0].failed == (0, 1, 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 50), st.integers(0, 2**31))
def test_top_tokens_are_in_the_order_of_a_stable_sort(num_ranks, num, vocab, seed):
    logits = torch.randint(-4, 4, (3, vocab), generator=torch.Generator().manual_seed(seed)).float()
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    found = Meeting(num_ranks).run(logits, lambda x, share: top_tokens(x[:, : share.count], num, share))
    assert found.token_ids.tolist() == ids[:, :num].tolist()
    assert found.logits.tolist() == values[:, :num].tolist()


def test_prompt_scores_of_ranks_are_those_of_one_process():
    logits = torch.randn(7, 90, generator=torch.Generator().manual_seed(2))
    following = torch.tensor([0, 89, 30, 31, 60, 5, 45])
    expected = score_tokens(logits, following, 4)
    found = Meeting(3).run(logits, lambda x, share: score_tokens(x[:, : share.count], following, 4, share))
    assert found == expected
