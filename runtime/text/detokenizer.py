"""Turns a growing list of token ids into growing text, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 16
"""So many tokens may wait for a character to become whole (UTF-8 needs 4 bytes); then they are no character."""
MAX_UTF8_BYTES = 4


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def special_ids(self) -> Set[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of one sequence, token by token: the increments joined are the decoded whole.

    A token's text depends on its left neighbours (a leading space is dropped at the start, bytes join to characters),
    so each step decodes a short window: `_ids[_context:_done]` has been given out already and is only there as left
    context, `_ids[_done:]` is waiting. The one exception to the rule above: in a sentencepiece vocabulary with byte
    fallback, bytes that turn out to be no UTF-8 after whole characters were given out do not take these back.
    """

    def __init__(self, decoder: Decoder, skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skipped = decoder.special_ids if skip_special_tokens else frozenset[int]()
        self._ids: list[int] = []
        self._context = 0
        self._done = 0
        self._context_len = 0

    def append(self, token_id: int) -> str:
        """The text that has become certain with this token, often "" while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._context, len(self._ids))
        if len(text) > self._context_len and not text.endswith(REPLACEMENT):
            return self._give_out(text, len(self._ids))
        if len(self._ids) - self._done < MAX_HELD_TOKENS:
            return ""
        end = self._clean_end(text)
        return self._give_out(self._decode(self._context, end), end)

    def extend(self, token_ids: Iterable[int]) -> str:
        """What `append` gives for all these tokens; they are decoded in one go if that ends with a whole character."""
        new = [token_id for token_id in token_ids if token_id not in self._skipped]
        text = self._decoder.decode(self._ids[self._context :] + new, skip_special_tokens=False)
        if len(text) <= self._context_len or text.endswith(REPLACEMENT):
            return "".join(map(self.append, new))
        self._ids += new
        return self._give_out(text, len(self._ids))

    def flush(self) -> str:
        """What is still held back, at the end of the sequence: an incomplete character comes out as U+FFFD."""
        return self._give_out(self._decode(self._context, len(self._ids)), len(self._ids))

    def _decode(self, start: int, end: int) -> str:
        return self._decoder.decode(self._ids[start:end], skip_special_tokens=False) if end > start else ""

    def _give_out(self, text: str, end: int) -> str:
        new = text[self._context_len :]
        del self._ids[: self._done]
        self._context, self._done = 0, end - self._done
        self._context_len = len(self._decode(0, self._done))
        return new

    def _clean_end(self, text: str) -> int:
        """The last place in the waiting tokens where no character is cut, leaving a tail that may yet become one."""
        end = len(self._ids)
        for cut in range(end - 1, end - MAX_UTF8_BYTES, -1):
            if self._decode(self._context, cut) + self._decode(cut, end) == text:
                return cut
        return end
