"""Batches of a step, their validation, and the sizes that they bind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_SIZE = 16
"""Token slots per KV block of concrete graphs."""


@dataclass
class PrefillBatch:
    """Prompts, or chunks of prompts, computed in one step; `total_tokens` is the sum of the lengths."""

    request_ids: list[str]
    input_lengths: list[int]
    total_tokens: int

    def check(self, max_seq_len: int) -> None:
        """Raises ValueError for an inconsistent batch, or a length beyond max_seq_len."""
        _check_lengths("prefill batch: input_lengths", self.request_ids, self.input_lengths, max_seq_len)
        total = sum(self.input_lengths)
        if self.total_tokens != total:
            raise ValueError(
                f"prefill batch: total_tokens must be {total}, the sum of input_lengths, got {self.total_tokens}"
            )


@dataclass
class DecodeBatch:
    """Requests that generate one token each; a context length counts the tokens in the cache and the new one."""

    request_ids: list[str]
    context_lengths: list[int]
    batch_size: int

    def check(self, max_seq_len: int) -> None:
        """Raises ValueError for an inconsistent batch, or a length beyond max_seq_len."""
        _check_lengths("decode batch: context_lengths", self.request_ids, self.context_lengths, max_seq_len)
        count = len(self.request_ids)
        if self.batch_size != count:
            raise ValueError(
                f"decode batch: batch_size must be {count}, the number of request_ids, got {self.batch_size}"
            )


def step_sizes(prefill: PrefillBatch | None, decode: DecodeBatch | None) -> dict[str, int]:
    """The symbols of a step that follow from its batch; `specs/dims.yaml` describes them.

    QK counts the pairs of a query and a key that it attends to: a decoding token attends to its whole context, a
    prompt of n tokens has n (n + 1) / 2 pairs.
    """
    prompts = prefill.input_lengths if prefill else []
    contexts = decode.context_lengths if decode else []
    lengths = [*contexts, *prompts]
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    return {
        "T": len(contexts) + sum(prompts),
        "Td": len(contexts),
        "Tp": sum(prompts),
        "B": len(lengths),
        "S": len(lengths),
        "PG": sum(blocks),
        "BS": BLOCK_SIZE,
        "MB": max(blocks),
        "KV": sum(lengths),
        "KVd": sum(contexts),
        "LL": sum(length * length for length in lengths),
        "QK": sum(contexts) + sum(length * (length + 1) // 2 for length in prompts),
    }


def _check_lengths(field: str, ids: Sequence[str], lengths: Sequence[int], max_seq_len: int) -> None:
    if not ids:
        raise ValueError(f"{field}: expected at least one request, got an empty batch")
    if len(ids) != len(lengths):
        raise ValueError(f"{field}: expected one length per request, got {len(lengths)} for {len(ids)}")
    for i, length in enumerate(lengths):
        if not 1 <= length <= max_seq_len:
            raise ValueError(f"{field}[{i}] must be 1 to max_seq_len={max_seq_len}, got {length}")
