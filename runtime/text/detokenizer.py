"""Incremental detokenisation: decodes a growing list of token ids without emitting incomplete characters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence, Set
from typing import Protocol

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 16
"""The most tokens that wait for a complete character. UTF-8 needs at most 4, so longer waits are invalid bytes."""
MAX_UTF8_BYTES = 4
NUM_PROMPT_TOKENS = 8
"""Prompt tokens that are the left context of an answer. One with text suffices; special ids can be without text."""


class Decoder(Protocol):
    """The part of a tokenizer that detokenisation requires."""

    @property
    def special_ids(self) -> Set[int]: ...

    @property
    def byte_ids(self) -> Set[int]:
        """Tokens of single bytes in a vocabulary with byte fallback; a run of them is decoded as a whole."""
        ...

    def whole_text(self, token_id: int) -> str:
        """The text of a token that is the same after any complete character; "" if that is not certain."""
        ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str: ...


def common_prefix_len(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Detokenizer:
    """The text of one answer, token by token: decode(prompt + answer) minus decode(prompt).

    A token's text depends on its left neighbours: sentencepiece-style decoders drop a leading space at the start of a
    text, and the bytes of a character may be split over tokens. So each step decodes a short window.
    `_ids[_context:_done]` has been emitted and serves as left context only; `_ids[_done:]` is pending. Decoding
    everything again for each token would be quadratic. The first window begins with the last tokens of the prompt.

    A prompt that ends within a character leaves its incomplete bytes pending, so the answer's text has the character
    once it is complete.

    With byte fallback, a run of byte tokens is valid UTF-8 as a whole, or every byte of it becomes U+FFFD. So a run is
    pending until it ends. One exception to the first sentence: of a run of more than MAX_HELD_TOKENS, complete
    characters are emitted, and bytes that follow and prove to be invalid do not change them any more.
    """

    def __init__(
        self,
        decoder: Decoder,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
        kept_ids: Set[int] = frozenset(),
    ) -> None:
        """Special tokens are skipped, except for `kept_ids`."""
        self._decoder = decoder
        self._byte_ids = frozenset(decoder.byte_ids)
        self._in_run = False
        self._skipped = decoder.special_ids - kept_ids if skip_special_tokens else frozenset[int]()
        self._ids = self._last_of(prompt_token_ids)
        self._context = 0
        self._done = 0
        self._context_len = 0
        # The text of a prompt that ends within a character; "" once text was emitted.
        self._incomplete_prompt = ""
        if self._ids:
            self._start_after_prompt()

    def _last_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The last prompt tokens that are not skipped, with room to begin the context at a character."""
        shown = (token_id for token_id in reversed(prompt_token_ids) if token_id not in self._skipped)
        return list(itertools.islice(shown, NUM_PROMPT_TOKENS + MAX_UTF8_BYTES - 1))[::-1]

    def _start_after_prompt(self) -> None:
        """Makes the complete characters at the end of the prompt the context, and the tokens after them pending.

        A window that begins or ends within a character has U+FFFD there, so it begins up to 3 tokens earlier and leaves
        up to 3 tokens pending. If no window is clean, the prompt has invalid bytes, and the whole window is context.
        """
        num_ids, shifts = len(self._ids), range(MAX_UTF8_BYTES)
        for num_pending, shift in itertools.product(shifts, shifts):
            start, end = max(0, num_ids - NUM_PROMPT_TOKENS - shift), num_ids - num_pending
            text = self._decode(start, end)
            if not text.startswith(REPLACEMENT) and not text.endswith(REPLACEMENT):
                break
        else:
            start, end = 0, num_ids
            text = self._decode(start, end)
        if end < num_ids:
            self._incomplete_prompt = self._decode(start, num_ids)
        self._ids, self._done, self._context_len = self._ids[start:], end - start, len(text)

    def append(self, token_id: int) -> str:
        """The text that this token makes final, often "" while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        if self._done == len(self._ids) and not self._in_run and (text := self._decoder.whole_text(token_id)):
            self._ids, self._context, self._done, self._context_len = [token_id], 0, 1, len(text)
            return text
        self._ids.append(token_id)
        text = self._decode(self._context, len(self._ids))
        # An id without text does not end a run. A space has no text alone, where a decoder drops the leading one.
        self._in_run = token_id in self._byte_ids or (self._in_run and not self._decoder.decode([token_id] * 2, False))
        if not self._in_run and self._is_final(text):
            return self._emit(text, len(self._ids))
        if len(self._ids) - self._done < MAX_HELD_TOKENS:
            return ""
        end = self._clean_end(text)
        return self._emit(self._decode(self._context, end), end)

    def extend(self, token_ids: Iterable[int]) -> str:
        """The text of `append` for all these tokens, decoded in one call if they end with a complete character."""
        new = [token_id for token_id in token_ids if token_id not in self._skipped]
        text = self._decoder.decode(self._ids[self._context :] + new, skip_special_tokens=False)
        if self._in_run or not self._byte_ids.isdisjoint(new) or not self._is_final(text):
            return "".join(map(self.append, new))
        self._ids += new
        return self._emit(text, len(self._ids))

    def flush(self, token_ids: Iterable[int] = ()) -> str:
        """The pending text and that of the last tokens; an incomplete character becomes U+FFFD."""
        self._ids += [token_id for token_id in token_ids if token_id not in self._skipped]
        return self._emit(self._decode(self._context, len(self._ids)), len(self._ids))

    def _is_final(self, text: str) -> bool:
        """Whether the window has new text that later tokens do not change, outside of a run of byte tokens.

        The library decodes an incomplete character as U+FFFD.
        """
        return len(text) > self._context_len and not text.endswith(REPLACEMENT)

    def _decode(self, start: int, end: int) -> str:
        return self._decoder.decode(self._ids[start:end], skip_special_tokens=False) if end > start else ""

    def _emit(self, text: str, end: int) -> str:
        """Returns the new part of the decoded window, and makes `_ids[_done:end]` the left context of the next one."""
        new = text[max(self._context_len, common_prefix_len(self._incomplete_prompt, text)) :]
        self._incomplete_prompt = ""
        del self._ids[: self._done]
        self._context, self._done = 0, end - self._done
        self._context_len = len(self._decode(0, self._done))
        return new

    def _clean_end(self, text: str) -> int:
        """The last position in the pending tokens that does not split a character.

        The tokens after it, at most 3, may still be the beginning of a valid character.
        """
        end = len(self._ids)
        if self._in_run:
            complete = (cut for cut in range(end, end - MAX_UTF8_BYTES, -1) if self._is_final(self._decode(0, cut)))
            return next(complete, end)
        for cut in range(end - 1, end - MAX_UTF8_BYTES, -1):
            if self._decode(self._context, cut) + self._decode(cut, end) == text:
                return cut
        return end
