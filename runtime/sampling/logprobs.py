"""Log-probabilities of tokens: records, and their computation from logits.

Dimensions in names: R rows, V vocabulary entries or those of a share, K likeliest tokens reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.sampling.share import Share, local_top, merge_top, whole
from sageLLM.runtime.sampling.weights import UNITS, total_of, weigh


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural logarithm of one token's probability; `rank` 1 is the likeliest token of the vocabulary."""

    logprob: float
    rank: int
    decoded_token: str


class ScoredTokens(NamedTuple):
    """R tokens with their raw log-probabilities and ranks, and the K likeliest tokens of each row."""

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    def row(self, i: int) -> ScoredTokens:
        """Row i alone."""
        s = slice(i, i + 1)
        return ScoredTokens(self.token_ids[s], self.logprobs[s], self.ranks[s], self.top_ids[s], self.top_logprobs[s])

    def as_dict(self, row: int, num_top: int, decode: Callable[[int], str]) -> dict[int, Logprob]:
        """The row's token, then the `num_top` likeliest ones, each with `decode(token_id)` as its text."""
        token = self.token_ids[row]
        entries = {token: Logprob(self.logprobs[row], self.ranks[row], decode(token))}
        tops = zip(self.top_ids[row][:num_top], self.top_logprobs[row][:num_top], strict=True)
        for rank, (token_id, logprob) in enumerate(tops, start=1):
            entries.setdefault(token_id, Logprob(logprob, rank, decode(token_id)))
        return entries


def score_tokens(logits_RV: Tensor, token_ids: Tensor, num_top: int, share: Share | None = None) -> ScoredTokens:
    """Raw log-probabilities of token_ids i64[R] and of the `num_top` likeliest tokens under logits [R, V].

    The logits may be those of a share of the vocabulary. The result is then the same on all ranks, and the same as that
    of one rank with all logits.
    """
    share = share or whole(logits_RV.shape[1])
    logits = logits_RV.float()
    column, is_local = share.local(token_ids.unsqueeze(1))
    own = logits.gather(1, column).masked_fill(~is_local, -torch.inf) if share.count else column.float()
    parts = local_top(logits, max(num_top, 1), share)
    of_ranks, tokens_of_ranks, owns, are_local = share.exchange(*parts, own, is_local)
    of_token = owns.masked_fill(~are_local, 0.0).sum(dim=1)
    top = merge_top(of_ranks, tokens_of_ranks, min(max(num_top, 1), share.vocab_size))
    highest = top.logits[:, :1]
    num_above = (logits > of_token).sum(dim=-1, keepdim=True)
    totals, nums_above = share.exchange(total_of(weigh(logits - highest)), num_above)
    normalizer = highest.double() + (totals.sum(dim=1) / UNITS).log()
    of_tokens, tops = (of_token - normalizer).float().squeeze(1), (top.logits[:, :num_top] - normalizer).float()
    ranks = nums_above.sum(dim=1).squeeze(1) + 1
    top_ids = top.token_ids[:, :num_top].tolist()
    return ScoredTokens(token_ids.tolist(), of_tokens.tolist(), ranks.tolist(), top_ids, tops.tolist())


def score_prompt(
    logits_RV: Tensor, next_token_ids: Sequence[int], num_top: int, share: Share | None = None
) -> ScoredTokens:
    """The log-probabilities at each row; `next_token_ids[r]` is the prompt token after row r.

    A whole prompt of P tokens has P-1 rows; the caller puts None before them for the first token. Chunks of a prompt
    can be scored one after another. The logits may be those of a share, as in `score_tokens`.
    """
    return score_tokens(logits_RV, tensor_of(next_token_ids, logits_RV), num_top, share)


def tensor_of(indices: Sequence[int], like: Tensor) -> Tensor:
    """The numbers as i64 on the device of `like`."""
    return torch.tensor(indices, dtype=torch.int64, device=like.device)
