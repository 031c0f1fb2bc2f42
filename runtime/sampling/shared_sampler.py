"""Samples from logits that ranks share, with small collectives: the tokens are those of `sample` on all logits.

The ranks exchange their likeliest tokens, the candidates. These decide greedy rows, and rows with top-k, top-p or min-p
if a filter excludes the last candidate. A row without filters is drawn from the total weight of each rank, and then by
the rank of the token. Only rows in which filters keep more than the candidates are gathered whole. All ranks decide
this by the same numbers, those that were exchanged.

Dimensions in names: R random rows, V tokens of the share, K candidates, W ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sageLLM.runtime.sampling.logprobs import tensor_of
from sageLLM.runtime.sampling.sampler import (
    SampledTokens,
    SamplingBatch,
    adjust_logits,
    draw_tokens,
    nucleus,
    score_sampled,
)
from sageLLM.runtime.sampling.share import Share, TopTokens, top_tokens
from sageLLM.runtime.sampling.weights import find_above, first_above, total_of, weigh

NUM_CANDIDATES = 256
"""Candidates for top-p and min-p, which keep an unknown number of tokens; trained models rarely need more."""
MAX_CANDIDATES = 1024
"""Rows with a larger top-k are gathered whole."""


def sample_shared(logits_BV: Tensor, batch: SamplingBatch, share: Share) -> SampledTokens:
    """Samples one token for every row of logits f32[B, V] of the share, and padding. All ranks must call it."""
    raw = logits_BV[:, : share.count].float()
    adjusted = adjust_logits(raw, batch, share) if batch.adjusts else raw
    candidates = top_tokens(adjusted, num_candidates(batch), share)
    token_ids = candidates.token_ids[:, 0].clone()
    failed = (~candidates.logits[:, 0].isfinite()).nonzero().flatten().tolist()
    if batch.random_rows:
        rows = tensor_of(batch.random_rows, raw)
        top = TopTokens(candidates.logits[rows], candidates.token_ids[rows])
        padded = pad(adjusted[rows], (0, logits_BV.shape[1] - share.count), value=-torch.inf)
        token_ids[rows] = _draw(padded, top, batch, share)
    return SampledTokens(token_ids, score_sampled(raw, token_ids, batch, share), tuple(failed))


def num_candidates(batch: SamplingBatch) -> int:
    """The candidates that the rows of a batch require; a greedy row is decided by the first one."""
    num = max((k for k in batch.top_k.tolist() if k <= MAX_CANDIDATES), default=1)
    is_open = (batch.top_k == 0) & ((batch.top_p < 1.0) | (batch.min_p > 0.0))
    return max(num, 1, NUM_CANDIDATES if is_open.any() else 0)


def _draw(logits_RV: Tensor, top: TopTokens, batch: SamplingBatch, share: Share) -> Tensor:
    """Draws tokens i64[R] from adjusted logits."""
    uniforms_R1 = batch.uniforms(logits_RV.device).unsqueeze(1)
    if not (batch.max_top_k or batch.uses_top_p or batch.uses_min_p):
        in_share = weigh(_below_highest(logits_RV, top, batch))
        (of_ranks,) = share.exchange(total_of(in_share))
        return _draw_by_rank(in_share, of_ranks.squeeze(2), uniforms_R1, share)
    below = _below_highest(top.logits, top, batch)
    num_kept, is_decided = _keep_by_min_p_and_top_k(below, batch, share)
    weights = _first(weigh(below), num_kept)
    totals, uses_top_p = total_of(weights), batch.top_p < 1.0
    is_open = ~is_decided & (batch.top_k == 0) & (batch.min_p == 0.0)
    if len(open_rows := _rows(is_open)):
        in_share = weigh(_below_highest(logits_RV, top, batch)[open_rows])
        (of_ranks,) = share.exchange(total_of(in_share))
        totals[open_rows] = of_ranks.sum(dim=1)
    num_in_nucleus, is_covered = nucleus(weights, totals, batch.top_p)
    is_decided |= is_open & uses_top_p & is_covered
    weights = torch.where(uses_top_p.unsqueeze(1), _first(weights, num_in_nucleus), weights)
    tokens = _draw_candidates(weights, top.token_ids, uniforms_R1)
    if len(plain := _rows(is_open & ~uses_top_p)):
        is_plain = ~uses_top_p[open_rows]
        tokens[plain] = _draw_by_rank(in_share[is_plain], of_ranks[is_plain].squeeze(2), uniforms_R1[plain], share)
    if len(wide := _rows(~is_decided & ~(is_open & ~uses_top_p))):
        tokens[wide] = _draw_whole(logits_RV[wide], wide, batch, share)
    return tokens


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _below_highest(logits: Tensor, top: TopTokens, batch: SamplingBatch) -> Tensor:
    """As `scale_by_temperature`, with the highest logit of all ranks."""
    return (logits - top.logits[:, :1]) / batch.temperature.unsqueeze(1)


def _first(weights_RK: Tensor, num_R: Tensor) -> Tensor:
    """The weights with those after the first `num` set to zero."""
    places = torch.arange(weights_RK.shape[1], device=weights_RK.device)
    return weights_RK.masked_fill(places >= num_R.unsqueeze(1), 0.0)


def _keep_by_min_p_and_top_k(below_RK: Tensor, batch: SamplingBatch, share: Share) -> tuple[Tensor, Tensor]:
    """The number of candidates that min-p and top-k keep, and whether they keep no other tokens."""
    num = below_RK.shape[1]
    by_min_p = (below_RK.exp() >= batch.min_p.unsqueeze(1)).sum(dim=-1)
    has_top_k = (batch.top_k > 0) & (batch.top_k <= num)
    num_kept = torch.minimum(by_min_p, batch.top_k.masked_fill(~has_top_k, num)).clamp_(min=1)
    return num_kept, has_top_k | (num_kept < num) | (num == share.vocab_size)


def _draw_candidates(weights_RK: Tensor, token_ids_RK: Tensor, uniforms_R1: Tensor) -> Tensor:
    """Draws among candidates, in the order of their ids."""
    token_ids, order = token_ids_RK.sort(dim=-1)
    cdf = weights_RK.gather(1, order).double().cumsum(dim=-1)
    place, _ = first_above(cdf, uniforms_R1 * cdf[:, -1:])
    return token_ids.gather(1, place.unsqueeze(1)).squeeze(1)


def _draw_by_rank(weights_RV: Tensor, totals_RW: Tensor, uniforms_R1: Tensor, share: Share) -> Tensor:
    """Draws among all tokens, by the total weights of the ranks and by the weights of the share."""
    cdf = totals_RW.cumsum(dim=-1)
    target = uniforms_R1 * cdf[:, -1:]
    rank, before = first_above(cdf, target)
    own = share.first + find_above(weights_RV, target - before)
    (of_ranks,) = share.exchange(own.unsqueeze(1))
    return of_ranks.squeeze(2).gather(1, rank.unsqueeze(1)).squeeze(1)


def _draw_whole(logits_RV: Tensor, rows: Tensor, batch: SamplingBatch, share: Share) -> Tensor:
    """Draws for some of the random rows from the logits of all ranks."""
    (of_ranks,) = share.exchange(logits_RV)
    sequences = [batch.sequences[batch.random_rows[row]] for row in rows.tolist()]
    return draw_tokens(of_ranks.flatten(1)[:, : share.vocab_size], SamplingBatch(sequences, logits_RV.device))
