"""Decides when a sequence ends, and which of its text may be shown before that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from sageLLM.runtime.text.detokenizer import Decoder, Detokenizer

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class StopRules:
    """When one sequence ends, in the order in which the rules are asked: eos, stop ids, stop strings, length."""

    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    keeps_stop: bool
    min_tokens: int
    max_tokens: int

    @property
    def banned_before_min_tokens(self) -> tuple[int, ...]:
        """The ids that the sampler keeps from coming before `min_tokens` tokens are out."""
        return tuple(sorted(self.eos_ids | self.stop_ids)) if self.min_tokens else ()


class StopMatch(NamedTuple):
    """A stop string found in a text: text[start:start + len(stop)] == stop."""

    start: int
    stop: str


def find_stop(text: str, stops: Sequence[str], num_seen: int) -> StopMatch | None:
    """The earliest match (of these the longest) that ends behind text[:num_seen], which has been searched before."""
    found = ((text.find(stop, max(0, num_seen - len(stop) + 1)), stop) for stop in stops)
    matches = [StopMatch(start, stop) for start, stop in found if start >= 0]
    return min(matches, key=lambda m: (m.start, -len(m.stop)), default=None)


def shown_len(text: str, stops: Sequence[str]) -> int:
    """How much of the text may be shown: all but the longest end that is the beginning of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        tail = text[start:]
        if any(stop.startswith(tail) for stop in stops):
            return start
    return len(text)


class SequenceText:
    """One sequence's answer as it grows: tokens in, text out, until a rule ends it.

    `append` takes a token; `take_delta` gives the text to stream since the last call. Joined, the deltas are `text`:
    an end that may turn out to be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, decoder: Decoder | None, rules: StopRules, skip_special_tokens: bool = True) -> None:
        """Without a decoder (a checkpoint without tokenizer) the text stays empty and only ids and length stop."""
        self.rules = rules
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._detokenizer = None if decoder is None else Detokenizer(decoder, skip_special_tokens)
        self._unread: list[int] = []  # tokens that are not text yet: without stop strings that waits until it is wanted
        self._shown: list[str] = []
        self._num_taken = 0
        self._held = ""

    @property
    def text(self) -> str:
        """The text that is certain so far; after the end, the whole answer."""
        self._read()
        return "".join(self._shown)

    def take_delta(self) -> str:
        """The text that has become certain since the last call."""
        self._read()
        delta = "".join(self._shown[self._num_taken :])
        self._num_taken = len(self._shown)
        return delta

    def append(self, token_id: int) -> FinishReason | None:
        """Takes the next token and says whether, and how, it ended the sequence."""
        if self.finish_reason is not None:
            raise AssertionError("SequenceText: a token was appended to a finished sequence")
        self.token_ids.append(token_id)
        ends = self._may_stop and (token_id in self.rules.eos_ids or token_id in self.rules.stop_ids)
        if not ends or self.rules.keeps_stop:
            self._unread.append(token_id)
            if self.rules.stop_strings:
                self._read()
        if self.finish_reason is None and ends:
            self._finish("stop", None if token_id in self.rules.eos_ids else token_id)
        if self.finish_reason is None and len(self.token_ids) >= self.rules.max_tokens:
            self._finish("length", None)
        return self.finish_reason

    def abort(self) -> None:
        """Ends the sequence from outside; its text so far stays. A finished sequence stays as it is."""
        if self.finish_reason is None:
            self._read()
            self._show(self._held)
            self._end("abort", None)

    @property
    def _may_stop(self) -> bool:
        return len(self.token_ids) > self.rules.min_tokens

    def _read(self) -> None:
        """Turns the tokens that wait into text."""
        if self._unread:
            tokens, self._unread = self._unread, []
            if self._detokenizer is not None:
                self._grow(self._detokenizer.extend(tokens) if len(tokens) > 1 else self._detokenizer.append(tokens[0]))

    def _grow(self, new: str) -> None:
        """Shows what is certain of the held and the new text, and ends the sequence at a stop string in it."""
        text, stops = self._held + new, self.rules.stop_strings
        match = find_stop(text, stops, len(self._held)) if new and self._may_stop else None
        if match is not None:
            self._show(text[: match.start + (len(match.stop) if self.rules.keeps_stop else 0)])
            self._end("stop", match.stop)
            return
        certain = shown_len(text, stops)
        self._show(text[:certain])
        self._held = text[certain:]

    def _finish(self, reason: FinishReason, stop_reason: int | None) -> None:
        """Ends the sequence, unless the bytes that were waiting for the rest of a character hold a stop string."""
        self._read()
        self._grow("" if self._detokenizer is None else self._detokenizer.flush())
        if self.finish_reason is None:
            self._show(self._held)
            self._end(reason, stop_reason)

    def _end(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self._held = ""
        self.finish_reason, self.stop_reason = reason, stop_reason

    def _show(self, text: str) -> None:
        if text:
            self._shown.append(text)
