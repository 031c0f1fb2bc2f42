"""Tokens of a step on their way from the device: one copy and one wait per step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.executor.device_api import DeviceApi, DeviceEvent, Ints

FAILED = -1
"""The mark of a row without a finite maximum, in place of its token."""


class ReadTokens(NamedTuple):
    """Tokens of rows, and the rows without one; the token id of these is 0."""

    token_ids: list[int]
    failed: Sequence[int]


class PendingTokens:
    """The tokens of a step that may still run. `read` is valid until the step after the next one starts."""

    def __init__(self, tokens: Ints, copied: DeviceEvent) -> None:
        self._tokens, self._copied = tokens, copied

    def is_done(self) -> bool:
        """Whether `read` would not wait."""
        return self._copied.query()

    def read(self, count: int) -> ReadTokens:
        """Waits for the step; the tokens of the first `count` rows."""
        self._copied.synchronize()
        token_ids: list[int] = self._tokens[:count].tolist()
        if min(token_ids, default=0) >= 0:
            return ReadTokens(token_ids, ())
        failed = [row for row, token_id in enumerate(token_ids) if token_id == FAILED]
        return ReadTokens([max(token_id, 0) for token_id in token_ids], failed)

    def rows(self, rows: slice) -> "PendingTokens":
        return PendingTokens(self._tokens[rows], self._copied)


class TokenReader:
    """Starts the copies. Two buffers alternate, so that the tokens of a step can be read while the next one runs."""

    def __init__(self, api: DeviceApi) -> None:
        self._api = api
        self._hosts: list[Tensor] = []
        self._arrays: list[Ints] = []
        self._events = [api.new_event() for _ in range(2)]
        self._turn = 0

    def start(self, tokens: Tensor) -> PendingTokens:
        """Starts to copy marked tokens i32[S] to the host."""
        count = len(tokens)
        if not self._hosts or len(self._hosts[0]) < count:
            self._hosts = [self._api.host_ints(max(count, 256)) for _ in range(2)]
            self._arrays = [host.numpy() for host in self._hosts]
        self._turn ^= 1
        host, event = self._hosts[self._turn], self._events[self._turn]
        self._api.copy(host[:count], tokens)
        event.record()
        return PendingTokens(self._arrays[self._turn][:count], event)


def marked_tokens(values: Tensor, token_ids: Tensor, best: Tensor | None = None, drawn: Tensor | None = None) -> Tensor:
    """The tokens i32[S], or the `drawn` ones, with FAILED in rows without a finite maximum.

    `values` are the logits f32[S, V], `token_ids` the likeliest tokens, and `best` the logits f32[S] of these if other
    ranks have a part of them.
    """
    highest = values.gather(1, token_ids[:, None]).flatten() if best is None else best
    is_finite = highest - highest == 0  # NaN for NaN and infinities: two kernels instead of the four of isfinite
    return torch.where(is_finite, token_ids if drawn is None else drawn, FAILED).int()
