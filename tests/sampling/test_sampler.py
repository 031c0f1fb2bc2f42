"""The sampler compared with plain loops in float64, with a chi-square test, and with itself in other batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.runtime.sampling.logprobs import score_prompt, score_tokens
from sageLLM.runtime.sampling.sampler import (
    SamplingBatch,
    SequenceSampling,
    adjust_logits,
    filter_logits,
    sample,
    scale_by_temperature,
)
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.sampling.weights import invert_cdf


def batch_of(*params: SamplingParams, output: tuple[int, ...] = (), prompt: tuple[int, ...] = (0,)) -> SamplingBatch:
    return SamplingBatch([SequenceSampling(p, prompt, list(output)) for p in params])


def seeded_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def kept_by_loops(logits: list[float], params: SamplingParams) -> set[int]:
    """The tokens that remain in vLLM's order: min-p on the tempered probabilities, then top-k, then top-p.

    Of equal logits the lower ids come first, as in the op `sample` (specs/ops/sampling.yaml).
    """
    scaled = [logit / params.temperature for logit in logits]
    highest = max(scaled)
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    order = [i for i in order if math.exp(scaled[i] - highest) >= params.min_p]
    order = order[: params.top_k or None]
    weights = [math.exp(scaled[i] - highest) for i in order]
    before = [mass / math.fsum(weights) for mass in itertools.accumulate(weights, initial=0.0)]
    return {i for i, mass in zip(order, before, strict=False) if params.top_p >= 1.0 or mass < params.top_p}


logit_lists = st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=1, max_size=40)
filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.013, 0.1, 0.317, 0.5003, 0.9007, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.1007, 0.5003, 0.9999]),
).filter(lambda params: not params.is_greedy)


@settings(max_examples=300)
@given(logit_lists, filters)
def test_the_support_is_that_of_the_loops(logits, params):
    batch = batch_of(params)
    scaled = scale_by_temperature(torch.tensor([logits]), batch.temperature)
    kept = filter_logits(scaled, batch)[0].isfinite().nonzero().flatten().tolist()
    assert set(kept) == kept_by_loops(logits, params)


@pytest.mark.parametrize("top_k", [0, 3000])
def test_top_p_beyond_its_candidates_sorts_the_whole_row(top_k):
    """A flat distribution over 5,000 tokens, in which the 1,024 candidates have far less mass than p."""
    params = SamplingParams(top_p=0.95, top_k=top_k)
    logits = seeded_logits(1, 5000, scale=0.05)
    batch = batch_of(params)
    kept = filter_logits(scale_by_temperature(logits, batch.temperature), batch)[0].isfinite()
    reference = kept_by_loops(logits[0].tolist(), params)
    assert len(reference) > 2500
    assert len(set(kept.nonzero().flatten().tolist()) ^ reference) <= 1  # float32 may move one border token


def test_each_row_of_a_batch_has_its_own_filters():
    params = [
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.2, temperature=0.5),
        SamplingParams(),
        SamplingParams(top_k=10, top_p=0.8, min_p=0.01),
    ]
    logits = seeded_logits(5, 50)
    batch = batch_of(*params)
    kept = filter_logits(scale_by_temperature(logits, batch.temperature), batch).isfinite()
    for row, one in enumerate(params):
        assert set(kept[row].nonzero().flatten().tolist()) == kept_by_loops(logits[row].tolist(), one)


def test_greedy_rows_are_the_argmax_with_the_lowest_id_on_ties():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    batch = batch_of(*[SamplingParams(temperature=0.0)] * 2)
    assert sample(logits, batch).token_ids.tolist() == [1, 0]
    random = seeded_logits(64, 999)
    assert torch.equal(sample(random, batch_of(*[SamplingParams(temperature=0.0)] * 64)).token_ids, random.argmax(-1))


ONE_TOKEN = [
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-9),
    SamplingParams(top_p=1e-300, top_k=5),
    SamplingParams(min_p=1.0),
    SamplingParams(temperature=0.01),
    SamplingParams(temperature=1e-4, top_p=0.9),
    SamplingParams(temperature=100.0, top_k=1),
    SamplingParams(top_k=1, frequency_penalty=1e-3, logit_bias={900: 0.0}),
]


@pytest.mark.parametrize("params", ONE_TOKEN)
def test_parameters_that_leave_one_token_are_greedy_among_equal_logits(params):
    """Logits of bf16, of which every one occurs twice, and rows in which all are equal."""
    logits = seeded_logits(40, 1500).bfloat16().float().repeat(1, 2)
    logits[::4] = 1.0
    greedy = sample(logits, batch_of(*[SamplingParams(temperature=0.0)] * 40)).token_ids
    assert torch.equal(sample(logits, batch_of(*[params] * 40)).token_ids, greedy)


def test_equal_logits_are_drawn_equally_without_a_filter():
    num, logits = 4000, torch.tensor([[1.0, 1.0, -math.inf, 1.0]])
    batch = SamplingBatch([SequenceSampling(SamplingParams(seed=i), [0]) for i in range(num)])
    counts = torch.bincount(sample(logits.expand(num, -1), batch).token_ids, minlength=4)
    assert counts[2] == 0
    assert chi_square(counts[[0, 1, 3]], torch.full((3,), 1 / 3)) < 13.8  # the 99.9 % quantile, 2 degrees of freedom


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(top_k=2), [1, 3]),
        (SamplingParams(top_k=4), [0, 1, 3, 4]),
        (SamplingParams(top_k=6), [0, 1, 2, 3, 4, 5]),
        (SamplingParams(top_p=0.1), [1]),
        (SamplingParams(top_p=0.5, top_k=3), [1, 3]),
    ],
)
def test_a_filter_keeps_the_lower_ids_of_equal_logits(params, kept):
    logits = torch.tensor([[1.0, 2.0, -1.0, 2.0, 1.0, 1.0, -math.inf]])
    batch = batch_of(params)
    finite = filter_logits(scale_by_temperature(logits, batch.temperature), batch)[0].isfinite()
    assert finite.nonzero().flatten().tolist() == kept


def test_greedy_and_random_rows_mix():
    logits = seeded_logits(4, 100)
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(temperature=0.0)]
    batch = batch_of(*params, SamplingParams(top_p=1e-9))
    assert torch.equal(sample(logits, batch).token_ids, logits.argmax(-1))


def test_logits_are_not_changed():
    logits = seeded_logits(2, 30)
    before = logits.clone()
    params = SamplingParams(logit_bias={3: 5.0}, presence_penalty=1.0, repetition_penalty=1.5, min_tokens=1, top_k=4)
    sample(logits, SamplingBatch([SequenceSampling(params, [1], [2], stop_ids=(4,)) for _ in range(2)]))
    assert torch.equal(logits, before)


def draws(params: SamplingParams, logits: torch.Tensor, num: int, answer_index: int = 0) -> list[int]:
    sequence = SequenceSampling(params, [0], answer_index=answer_index)
    batch = SamplingBatch([sequence])
    for _ in range(num):
        sequence.output_token_ids.append(int(sample(logits, batch).token_ids))
    return sequence.output_token_ids


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_follow_the_distribution():
    """20,000 draws over 10 tokens: the 99.9 % quantile of chi-square with 9 degrees of freedom is 27.9."""
    num = 20_000
    logits = torch.linspace(-1.5, 1.5, 10)
    params = SamplingParams(temperature=0.8, seed=7, max_tokens=None)
    batch = SamplingBatch([SequenceSampling(params, [0], [0] * position) for position in range(num // 100)])
    counts = torch.zeros(10, dtype=torch.float64)
    for answer in range(100):
        for sequence in batch.sequences:
            sequence.answer_index = answer
        counts += torch.bincount(sample(logits.expand(len(batch), -1), batch).token_ids, minlength=10)
    assert chi_square(counts, torch.softmax(logits / 0.8, -1)) < 27.9


def test_the_inverted_cdf_returns_each_token_in_proportion_across_block_borders():
    """Equally spaced uniforms hit every token in proportion to its weight, also with more than one block."""
    weights = torch.rand(1, 700, generator=torch.Generator().manual_seed(1)) + 0.1
    weights[0, 250:300] = 0.0
    num = 200_000
    uniforms = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    tokens = torch.cat([invert_cdf(weights.expand(2000, -1), part) for part in uniforms.split(2000)])
    shares = torch.bincount(tokens, minlength=700).double() / num
    assert torch.allclose(shares, weights[0].double() / weights.double().sum(), atol=1.5 / num)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_no_draw_ever_hits_a_token_without_weight(uniform):
    weights = torch.zeros(3, 600)
    weights[0, 599], weights[1, 0], weights[2, 255:257] = 1.0, 1e-30, 0.1
    tokens = invert_cdf(weights, torch.full((3,), uniform, dtype=torch.float64)).tolist()
    assert tokens[:2] == [599, 0]
    assert tokens[2] in (255, 256)


def test_a_seed_gives_the_same_draws_again_and_another_seed_others():
    logits = seeded_logits(1, 1000, scale=1.0)
    first = draws(SamplingParams(seed=1, max_tokens=None), logits, 50)
    assert draws(SamplingParams(seed=1), logits, 50) == first
    assert draws(SamplingParams(seed=2), logits, 50) != first
    assert draws(SamplingParams(seed=1), logits, 50, answer_index=1) != first
    assert draws(SamplingParams(), logits, 50) != draws(SamplingParams(), logits, 50)
    assert len(set(first)) > 20


def test_known_seed_gives_known_tokens():
    """Pins the hash of seed, answer and position: a user's seed must mean the same in later versions."""
    sequence = SequenceSampling(SamplingParams(seed=1234), [0])
    first = sequence.uniform()
    sequence.output_token_ids.append(5)
    assert (round(first, 12), round(sequence.uniform(), 12)) == (0.165121603849, 0.835270771956)


@settings(max_examples=30)
@given(st.integers(0, 2**62), st.integers(1, 7), st.integers(0, 6))
def test_neighbours_do_not_matter(seed, num_neighbours, place):
    logits = seeded_logits(num_neighbours + 1, 300, seed=seed % 1000)
    place = min(place, num_neighbours)
    own = SequenceSampling(SamplingParams(seed=seed, top_p=0.9, temperature=1.3), [0], [1, 2])
    others = [
        SequenceSampling(SamplingParams(top_k=i, min_p=0.01 * i, presence_penalty=0.1 * i), [0], [3] * i)
        for i in range(num_neighbours)
    ]
    alone = sample(logits[place : place + 1], SamplingBatch([own])).token_ids[0]
    together = sample(logits, SamplingBatch([*others[:place], own, *others[place:]])).token_ids[place]
    assert alone == together


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 100.0])
def test_extreme_temperatures_make_no_nan(temperature):
    logits = seeded_logits(1, 100, scale=50.0)
    result = sample(logits, batch_of(SamplingParams(temperature=temperature, seed=1)))
    assert result.failed == ()
    if temperature < 1.0:
        assert result.token_ids.tolist() == logits.argmax(-1).tolist()


def test_rows_with_broken_logits_are_named():
    logits = seeded_logits(4, 10)
    logits[1, 3] = math.nan
    logits[2] = -math.inf
    params = [SamplingParams(seed=1), SamplingParams(seed=1), SamplingParams(seed=1), SamplingParams(temperature=0.0)]
    result = sample(logits, batch_of(*params))
    assert result.failed == (1, 2)
    assert result.token_ids[3] == logits[3].argmax()


def test_penalties_follow_their_formulas():
    logits = torch.tensor([[1.0, -1.0, 2.0, 3.0]])
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    batch = batch_of(params, prompt=(0, 1), output=(2, 2, 1))
    # seen: 0, 1, 2 -> 0.5, -2, 1; then 0.5 per occurrence and 0.25 once, of the output only
    assert adjust_logits(logits, batch)[0].tolist() == [0.5, -2.0 - 0.75, 1.0 - 1.25, 3.0]


def test_logit_bias_and_banned_stop_ids():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    sequence = SequenceSampling(SamplingParams(min_tokens=2, logit_bias={0: 1.5}), [0], [1], stop_ids=(2,))
    assert adjust_logits(logits, SamplingBatch([sequence]))[0].tolist() == [2.5, 2.0, -math.inf]
    sequence.output_token_ids.append(1)
    assert adjust_logits(logits, SamplingBatch([sequence]))[0].tolist() == [2.5, 2.0, 3.0]


def text_of(token_id: int) -> str:
    return f"<{token_id}>"


def test_logprobs_are_raw_whatever_the_sampling_does():
    logits = seeded_logits(2, 20)
    params = SamplingParams(temperature=0.3, top_k=1, logprobs=3, logit_bias={4: 100.0})
    result = sample(logits, batch_of(params, SamplingParams(temperature=0.0)))
    assert list(result.logprobs) == [0]
    entries = result.logprobs[0].as_dict(0, 3, text_of)
    expected = torch.log_softmax(logits[0].double(), -1)
    order = expected.argsort(descending=True).tolist()
    assert result.token_ids[0] == 4
    assert list(entries) == [4, *[i for i in order[:3] if i != 4]]
    for token_id, entry in entries.items():
        assert entry.logprob == pytest.approx(float(expected[token_id]), abs=1e-5)
        assert entry.rank == order.index(token_id) + 1
        assert entry.decoded_token == f"<{token_id}>"


def test_rows_that_ask_for_different_numbers_get_theirs():
    logits = seeded_logits(3, 20)
    params = [SamplingParams(temperature=0.0, logprobs=k) for k in (0, 5, 2)]
    result = sample(logits, batch_of(*params))
    assert [len(result.logprobs[row].as_dict(0, k, text_of)) for row, k in enumerate((0, 5, 2))] == [1, 5, 2]


def test_more_logprobs_than_tokens_gives_all():
    scored = score_tokens(seeded_logits(1, 4), torch.tensor([2]), 20)
    assert set(scored.as_dict(0, 20, text_of)) == {0, 1, 2, 3}


def test_prompt_logprobs_in_chunks_are_those_of_the_whole():
    logits = seeded_logits(9, 30)
    targets = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    scored = score_prompt(logits, targets, 2)
    whole = [scored.as_dict(row, 2, text_of) for row in range(9)]
    chunks = (score_prompt(logits[:4], targets[:4], 2), 4), (score_prompt(logits[4:], targets[4:], 2), 5)
    assert whole == [part.as_dict(row, 2, text_of) for part, num_rows in chunks for row in range(num_rows)]
    expected = torch.log_softmax(logits.double(), -1)
    for row, target in enumerate(targets):
        assert whole[row][target].logprob == pytest.approx(float(expected[row, target]), abs=1e-5)
        assert whole[row][target].rank == int((logits[row] > logits[row, target]).sum()) + 1


def test_prompt_logprobs_of_one_token_prompt_are_empty():
    assert score_prompt(torch.empty(0, 30), [], 2).token_ids == []


def test_a_wrong_number_of_rows_is_an_assertion():
    with pytest.raises(AssertionError, match="expected 1 rows of logits, got 2"):
        sample(seeded_logits(2, 5), batch_of(SamplingParams()))
