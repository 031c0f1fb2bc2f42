"""Samples the next token of every sequence in a batch from its logits.

Dimensions in names: B sequences, R random or scored rows, V vocabulary entries, K likeliest tokens reported. The steps
have vLLM's order: constraints, banned ids and biases, penalties, then the argmax for greedy rows, and temperature,
min-p, top-k, top-p and a draw for the others. Of equal logits the lowest id is the likeliest token, in the argmax and
in the filters. Log-probabilities are those of the raw logits, before all of these steps.

The draw inverts the cumulative distribution at one uniform number, which is a hash of (seed, answer index, position).
It therefore requires no generator state, is the same on every device and in every batch, and a sequence that is
preempted and replayed draws the same tokens again. (Gumbel sampling would need V random numbers per row.)
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sageLLM.runtime.sampling.logprobs import ScoredTokens, score_tokens, tensor_of
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.sampling.share import Share, whole
from sageLLM.runtime.sampling.weights import invert_cdf, total_of, weigh

NUM_TOP_P_CANDIDATES = 1024
"""Top-p takes this many likeliest tokens first, and sorts the whole vocabulary only if their mass is less than p.

A topk of 1024 is several times faster than a sort of 128k entries, and trained models rarely need more for p < 1.
"""


class TokenConstraint(Protocol):
    """Decides which tokens may come next, by the tokens before."""

    def bias(self) -> Tensor:
        """What to add to the logits: 0 for the tokens that may come next and -inf for the others, f32[V] on the CPU."""


@dataclass(slots=True)
class SequenceSampling:
    """Sampling state of one sequence. The worker owns both token lists and appends each new token.

    `stop_ids` are banned until `params.min_tokens` tokens are generated: stop ids and, unless they are ignored, the
    end-of-sequence ids. `answer_index` distinguishes the `n` answers of one request, so that they draw differently from
    the same seed.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int] = field(default_factory=list)
    stop_ids: Sequence[int] = ()
    answer_index: int = 0
    seed: int | None = None
    constraint: TokenConstraint | None = None
    is_plain_greedy: bool = field(init=False)
    """Whether the graph's argmax is the answer: the logits are not adjusted and no log-probabilities are requested."""
    is_plain_draw: bool = field(init=False)
    """Whether the token is drawn from logits that are neither adjusted nor filtered, as the op `draw` does."""

    def __post_init__(self) -> None:
        params = self.params
        if self.seed is None:
            self.seed = choose_seed(params)
        adjusts = params.has_penalties or bool(params.logit_bias) or params.structured_outputs is not None
        is_plain = params.logprobs is None and not (adjusts or self.stop_ids)
        filters = params.min_p > 0.0 or params.top_k > 0 or params.top_p < 1.0
        self.is_plain_greedy = params.is_greedy and is_plain
        self.is_plain_draw = is_plain and not (params.is_greedy or filters)

    @property
    def bans_stop_ids(self) -> bool:
        return bool(self.stop_ids) and len(self.output_token_ids) < self.params.min_tokens

    def uniform(self, num_ahead: int = 0) -> float:
        """The number in [0, 1) that decides the next token, or the one after `num_ahead` more tokens."""
        key = struct.pack("<qqq", self.seed, self.answer_index, len(self.output_token_ids) + num_ahead)
        bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return (bits >> 11) * 2.0**-53  # a float64 holds 53 bits exactly, so the result cannot round up to 1


def choose_seed(params: SamplingParams) -> int:
    """The seed of the parameters, or a random one."""
    return params.seed if params.seed is not None else secrets.randbits(63)


class SamplingBatch:
    """The sequences of one sampling step, one per row, with their constant parameters as tensors.

    A batch can be reused while it holds the same sequences: positions and penalties are read from the sequences at
    each `sample`.
    """

    def __init__(self, sequences: Iterable[SequenceSampling], device: torch.device | str = "cpu") -> None:
        self.sequences = list(sequences)
        params = [s.params for s in self.sequences]
        self.random_rows = [i for i, p in enumerate(params) if not p.is_greedy]
        self.penalty_rows = [i for i, p in enumerate(params) if p.has_penalties]
        self.logprob_rows = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.num_logprobs = max((p.logprobs or 0 for p in params), default=0)
        self.adjusts = bool(self.penalty_rows) or any(
            p.logit_bias or p.min_tokens or p.structured_outputs is not None for p in params
        )
        drawn = [params[i] for i in self.random_rows]
        self.temperature = torch.tensor([p.temperature for p in drawn], dtype=torch.float32, device=device)
        self.min_p = torch.tensor([p.min_p for p in drawn], dtype=torch.float32, device=device)
        self.top_k = torch.tensor([p.top_k for p in drawn], dtype=torch.int64, device=device)
        self.top_p = torch.tensor([p.top_p for p in drawn], dtype=torch.float64, device=device)
        self.uses_min_p = any(p.min_p > 0.0 for p in drawn)
        self.max_top_k = max((p.top_k for p in drawn), default=0)
        self.all_top_k = all(p.top_k for p in drawn)
        self.uses_top_p = any(p.top_p < 1.0 for p in drawn)

    def __len__(self) -> int:
        return len(self.sequences)

    def uniforms(self, device: torch.device) -> Tensor:
        """The numbers in [0, 1) that decide the random rows, f64[R]."""
        numbers = [self.sequences[row].uniform() for row in self.random_rows]
        return torch.tensor(numbers, dtype=torch.float64, device=device)


class SampledTokens(NamedTuple):
    """The result of one step.

    token_ids i64[B]; logprobs: a `ScoredTokens` of one row for each batch row that requests it, keyed by batch row;
    failed: rows with a NaN or without a finite maximum. Their token id is meaningless and their request must end.
    """

    token_ids: Tensor
    logprobs: dict[int, ScoredTokens]
    failed: tuple[int, ...]


def sample(logits_BV: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Samples one token for every row of logits f32[B, V]; the logits are not changed."""
    if logits_BV.shape[0] != len(batch):
        raise AssertionError(f"sample: expected {len(batch)} rows of logits, got {logits_BV.shape[0]}")
    raw = logits_BV.float()
    adjusted = adjust_logits(raw, batch) if batch.adjusts else raw
    highest, token_ids = adjusted.max(dim=-1)
    # max propagates NaN, so this detects NaN, inf, and rows in which every token is banned.
    failed = (~highest.isfinite()).nonzero().flatten().tolist()
    if batch.random_rows:
        rows = tensor_of(batch.random_rows, raw)
        token_ids[rows] = draw_tokens(adjusted if len(rows) == len(batch) else adjusted[rows], batch)
    return SampledTokens(token_ids, score_sampled(raw, token_ids, batch), tuple(failed))


def adjust_logits(logits_BV: Tensor, batch: SamplingBatch, share: Share | None = None) -> Tensor:
    """A copy of the logits with tokens against a constraint and banned stop ids at -inf, biases, and penalties.

    The logits may be those of a share of the vocabulary.
    """
    share = share or whole(logits_BV.shape[1])
    adjusted = logits_BV.clone()
    for row, sequence in enumerate(batch.sequences):
        if sequence.constraint is not None:
            adjusted[row] += sequence.constraint.bias()[share.first : share.first + share.count].to(adjusted.device)
        # Bans come before biases and penalties, so that no finite adjustment can lift a banned id from -inf.
        if sequence.bans_stop_ids:
            adjusted[row, _columns(sequence.stop_ids, adjusted, share)] = -torch.inf
        if bias := {i: value for i, value in (sequence.params.logit_bias or {}).items() if share.has(i)}:
            adjusted[row, _columns(bias, adjusted, share)] += torch.tensor(list(bias.values()), device=adjusted.device)
    for row in batch.penalty_rows:
        _apply_penalties(adjusted[row], batch.sequences[row], share)
    return adjusted


def _columns(token_ids: Iterable[int], like: Tensor, share: Share) -> Tensor:
    """The columns of the tokens that are in the share."""
    return tensor_of([token_id - share.first for token_id in token_ids if share.has(token_id)], like)


def _apply_penalties(logits_V: Tensor, sequence: SequenceSampling, share: Share) -> None:
    """Applies the penalties in place.

    Repetition (CTRL, arXiv 1909.05858) counts prompt and answer, frequency and presence (OpenAI) the answer only.
    """
    params = sequence.params
    if params.repetition_penalty != 1.0:
        used = _columns([*set(sequence.prompt_token_ids), *set(sequence.output_token_ids)], logits_V, share)
        values = logits_V[used]
        factor = params.repetition_penalty
        # Dividing a negative logit would raise it, so the factor is applied towards lower values on both sides of 0.
        logits_V[used] = torch.where(values > 0, values / factor, values * factor)
    if sequence.output_token_ids:
        counts = torch.bincount(_columns(sequence.output_token_ids, logits_V, share), minlength=len(logits_V))
        logits_V -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def draw_tokens(logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
    """Draws tokens i64[R] for the batch's random rows from their adjusted logits f32[R, V]."""
    kept = filter_logits(scale_by_temperature(logits_RV, batch.temperature), batch)
    return invert_cdf(weigh(kept), batch.uniforms(kept.device))


def scale_by_temperature(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """(logits - max) / temperature, f32[R, V]. The maximum becomes 0, so even a tiny temperature cannot make a NaN."""
    return (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R.unsqueeze(1)


def filter_logits(logits_RV: Tensor, batch: SamplingBatch) -> Tensor:
    """Sets the logits that min-p, top-k and top-p exclude to -inf; the maximum of each row must be 0.

    Top-k and top-p keep the first tokens in the order of descending logits, equal logits by ascending id. So top-k
    keeps exactly k tokens, and a filter that keeps one token keeps the greedy one. Logits of bf16 are often equal.
    """
    kept = logits_RV
    if batch.uses_min_p:
        # p < min_p * p_max, both sides divided by p_max; the largest weight is exp(0) = 1.
        kept = kept.masked_fill(kept.exp() < batch.min_p.unsqueeze(1), -torch.inf)
    if batch.max_top_k:
        kept = _keep_first(kept, _top_k_cut(kept, batch))
    if batch.uses_top_p:
        kept = _keep_first(kept, _top_p_cut(kept, batch))
    return kept


class Cut(NamedTuple):
    """The last kept logit of each row, [R, 1], and the number of kept tokens, i64[R].

    The logit is -inf, and the number unused, in a row that keeps all tokens.
    """

    threshold: Tensor
    num_kept: Tensor


def _keep_first(logits_RV: Tensor, cut: Cut) -> Tensor:
    """Sets all but the first `num_kept` logits to -inf; of the logits equal to the threshold the lowest ids stay."""
    below = logits_RV < cut.threshold
    kept = logits_RV.masked_fill(below, -torch.inf)
    num_surplus = logits_RV.shape[1] - below.sum(dim=-1) - cut.num_kept
    rows = ((num_surplus > 0) & cut.threshold.squeeze(1).isfinite()).nonzero().flatten()
    if len(rows):
        tied = kept[rows] == cut.threshold[rows]
        num_kept_ties = tied.sum(dim=-1, keepdim=True) - num_surplus[rows].unsqueeze(1)
        kept[rows] = kept[rows].masked_fill(tied & (tied.cumsum(dim=-1) > num_kept_ties), -torch.inf)
    return kept


def _top_k_cut(logits_RV: Tensor, batch: SamplingBatch) -> Cut:
    """The k-th highest logit of each row, and k."""
    top_k = batch.top_k.clamp(max=logits_RV.shape[1])
    highest = torch.topk(logits_RV, min(batch.max_top_k, logits_RV.shape[1]), dim=-1).values
    threshold = highest.gather(1, (top_k - 1).clamp(min=0).unsqueeze(1))
    return Cut(threshold.masked_fill(top_k.unsqueeze(1) == 0, -torch.inf), top_k)


def _top_p_cut(logits_RV: Tensor, batch: SamplingBatch) -> Cut:
    """The cut of top-p: a token stays if the mass of the tokens before it is less than p (arXiv 1904.09751).

    For a row with top-k the candidates are the kept tokens; for the others NUM_TOP_P_CANDIDATES. Only rows in which
    these do not reach p are sorted.
    """
    total = total_of(weigh(logits_RV))
    num_candidates = min(batch.max_top_k if batch.all_top_k else NUM_TOP_P_CANDIDATES, logits_RV.shape[1])
    highest = torch.topk(logits_RV, num_candidates, dim=-1).values
    (threshold, num_kept), covered = _nucleus_cut(highest, total, batch.top_p)
    short = (~covered & (batch.top_p < 1.0)).nonzero().flatten()
    if len(short) and num_candidates < logits_RV.shape[1]:
        in_order = torch.sort(logits_RV[short], dim=-1, descending=True).values
        (threshold[short], num_kept[short]), _ = _nucleus_cut(in_order, total[short], batch.top_p[short])
    return Cut(threshold.masked_fill(batch.top_p.unsqueeze(1) >= 1.0, -torch.inf), num_kept)


def nucleus(weights_RC: Tensor, total_R1: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """The number of descending weights that top-p keeps, i64[R], and whether they all reach its mass, bool[R]."""
    weights, limit = weights_RC.double(), top_p_R.unsqueeze(1) * total_R1
    mass = weights.cumsum(dim=-1)
    num_kept = (mass - weights < limit).sum(dim=-1).clamp_(min=1)
    return num_kept, mass[:, -1] >= limit.squeeze(1)


def _nucleus_cut(highest_RC: Tensor, total_R1: Tensor, top_p_R: Tensor) -> tuple[Cut, Tensor]:
    """The cut among descending logits, and whether their mass reaches p, bool[R]."""
    num_kept, covered = nucleus(weigh(highest_RC), total_R1, top_p_R)
    return Cut(highest_RC.gather(1, num_kept.unsqueeze(1) - 1), num_kept), covered


def score_sampled(
    raw_BV: Tensor, token_ids_B: Tensor, batch: SamplingBatch, share: Share | None = None
) -> dict[int, ScoredTokens]:
    """The log-probabilities of the rows that request them."""
    if not batch.logprob_rows:
        return {}
    rows = tensor_of(batch.logprob_rows, raw_BV)
    scored = score_tokens(raw_BV[rows], token_ids_B[rows], batch.num_logprobs, share)
    return {row: scored.row(i) for i, row in enumerate(batch.logprob_rows)}
