"""Shares of a vocabulary: ranks have the logits of some tokens each, and exchange small parts of them.

Dimensions in names: R rows, V tokens of the share, K tokens that are wanted, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """The tokens `first` to `first + count` of `vocab_size`, of one of `num_ranks` ranks; ranks have ascending tokens.

    `gather` returns the x u8[R, B] of all ranks, u8[W, R, B]; all of them must call it at the same time.
    """

    first: int
    count: int
    vocab_size: int
    num_ranks: int = 1
    gather: Callable[[Tensor], Tensor] = lambda x: x[None]

    def has(self, token_id: int) -> bool:
        return self.first <= token_id < self.first + self.count

    def exchange(self, *columns: Tensor) -> list[Tensor]:
        """The tensors [R, n] of all ranks side by side, [R, W, n], in one collective for tensors of any types."""
        if self.num_ranks == 1:
            return [column[:, None] for column in columns]
        own = [column.contiguous().view(torch.uint8) for column in columns]
        found = self.gather(torch.cat(own, -1)).transpose(0, 1)
        parts = torch.split(found, [part.shape[1] for part in own], -1)
        return [part.contiguous().view(column.dtype) for part, column in zip(parts, columns, strict=True)]

    def local(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of tokens i64 in the share, and whether each is in it; column 0 if not."""
        columns = token_ids - self.first
        is_local = (columns >= 0) & (columns < self.count)
        return columns.masked_fill(~is_local, 0), is_local


def whole(vocab_size: int) -> Share:
    """The share of a single rank."""
    return Share(0, vocab_size, vocab_size)


class TopTokens(NamedTuple):
    """The likeliest K tokens of each row in order: by descending logit f32[R, K], equal ones by ascending id i64[R, K].

    As each rank contributes its likeliest K, these are the ones of all, whatever their distribution over the ranks.
    """

    logits: Tensor
    token_ids: Tensor


def top_tokens(logits_RV: Tensor, num: int, share: Share) -> TopTokens:
    """The likeliest `num` tokens of the vocabulary, in one collective."""
    logits, token_ids = share.exchange(*local_top(logits_RV, num, share))
    return merge_top(logits, token_ids, min(num, share.vocab_size))


def local_top(logits_RV: Tensor, num: int, share: Share) -> TopTokens:
    """The likeliest `num` tokens of the share; -inf for those that it lacks."""
    num_found, num = min(num, share.count), min(num, share.vocab_size)
    logits = logits_RV.new_full((len(logits_RV), num), -torch.inf)
    token_ids = logits_RV.new_full((len(logits_RV), num), share.first, dtype=torch.int64)
    if num_found:
        found = _first(logits_RV, num_found)
        logits[:, :num_found], token_ids[:, :num_found] = found.logits, found.token_ids + share.first
    return TopTokens(logits, token_ids)


def merge_top(logits_RWK: Tensor, token_ids_RWK: Tensor, num: int) -> TopTokens:
    """The likeliest `num` of the tokens of all ranks."""
    logits, token_ids = logits_RWK.flatten(1), token_ids_RWK.flatten(1)
    if logits_RWK.shape[1] == 1:
        return TopTokens(logits[:, :num], token_ids[:, :num])
    # Of equal logits those of lower ranks come first, and with them the lower ids, as the sort is stable.
    logits, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    return TopTokens(logits[:, :num], token_ids.gather(1, order[:, :num]))


def _first(logits_RV: Tensor, num: int) -> TopTokens:
    """The first `num` columns by descending logit, equal ones in ascending order; topk leaves their order open."""
    if num == 1:
        return TopTokens(*logits_RV.max(dim=-1, keepdim=True))
    logits, columns = torch.topk(logits_RV, min(num + 1, logits_RV.shape[1]), dim=-1)
    if logits.shape[1] > num:
        cut = (logits[:, num - 1] == logits[:, num]).nonzero().flatten()
        logits, columns = logits[:, :num], columns[:, :num]
        if len(cut):
            columns[cut] = _lowest_of_equal(logits_RV[cut], logits[cut, -1:], num)
    columns = columns.sort(dim=-1).values
    logits, order = torch.sort(logits_RV.gather(1, columns), dim=-1, descending=True, stable=True)
    return TopTokens(logits, columns.gather(1, order))


def _lowest_of_equal(logits_RV: Tensor, threshold_R1: Tensor, num: int) -> Tensor:
    """The `num` columns of each row with the logits above the threshold and the first ones of those equal to it."""
    above, equal = logits_RV > threshold_R1, logits_RV == threshold_R1
    kept = above | (equal & (equal.cumsum(dim=-1) <= num - above.sum(dim=-1, keepdim=True)))
    return kept.nonzero()[:, 1].view(-1, num)
