"""Log-probabilities of tokens: records, and their computation from logits.

Dimensions in names: R rows, V vocabulary entries, K likeliest tokens reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


def score_tokens(logits_RV: Tensor, token_ids: Tensor, num_top: int) -> ScoredTokens:
    """Raw log-probabilities of token_ids i64[R] and of the `num_top` likeliest tokens under logits [R, V]."""
    logprobs = torch.log_softmax(logits_RV.float(), dim=-1)
    of_tokens = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > of_tokens).sum(dim=-1) + 1
    top = torch.topk(logprobs, min(num_top, logprobs.shape[1]), dim=-1)
    return ScoredTokens(
        token_ids.tolist(), of_tokens.squeeze(1).tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist()
    )


def score_prompt(logits_RV: Tensor, next_token_ids: Sequence[int], num_top: int) -> ScoredTokens:
    """The log-probabilities at each row; `next_token_ids[r]` is the prompt token after row r.

    A whole prompt of P tokens has P-1 rows; the caller puts None before them for the first token. Chunks of a prompt
    can be scored one after another.
    """
    return score_tokens(logits_RV, tensor_of(next_token_ids, logits_RV), num_top)


def tensor_of(indices: Sequence[int], like: Tensor) -> Tensor:
    """The numbers as i64 on the device of `like`."""
    return torch.tensor(indices, dtype=torch.int64, device=like.device)
