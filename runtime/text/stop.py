"""Ends sequences by their stop rules, and holds back text that may turn out to begin a stop string."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from sageLLM.runtime.text.detokenizer import Decoder, Detokenizer

FinishReason: TypeAlias = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class StopRules:
    """The conditions that end one sequence.

    `eos_ids` and `stop_ids` end it with their token, `stop_strings` with the text that completes one of them; none of
    them applies to the first `min_tokens` tokens. `max_tokens` applies last, so a stop at the last token counts as a
    stop. `keeps_stop` keeps the stop token or string in the text.
    """

    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    keeps_stop: bool
    min_tokens: int
    max_tokens: int

    @property
    def banned_before_min_tokens(self) -> tuple[int, ...]:
        """The ids that the sampler must not draw before `min_tokens` tokens are generated."""
        return tuple(sorted(self.eos_ids | self.stop_ids)) if self.min_tokens else ()


class StopMatch(NamedTuple):
    """A match of a stop string: text[start:start + len(stop)] == stop."""

    start: int
    stop: str


def find_stop(text: str, stops: Sequence[str], num_seen: int) -> StopMatch | None:
    """The earliest match that ends after text[:num_seen], the longest of several at the same start.

    text[:num_seen] has been searched before, so the search starts where a match can still end in the new text.
    """
    found = ((text.find(stop, max(0, num_seen - len(stop) + 1)), stop) for stop in stops)
    matches = [StopMatch(start, stop) for start, stop in found if start >= 0]
    return min(matches, key=lambda m: (m.start, -len(m.stop)), default=None)


def visible_len(text: str, stops: Sequence[str]) -> int:
    """The length of the text that can be shown: all but the longest suffix that is a prefix of a stop string."""
    longest = max(map(len, stops), default=1) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        tail = text[start:]
        if any(stop.startswith(tail) for stop in stops):
            return start
    return len(text)


class SequenceText:
    """The text of one growing answer: tokens in, text out, until a rule ends it.

    `append` adds a token; `take_delta` returns the text to stream since the last call. The deltas joined are `text`: a
    suffix that may be the beginning of a stop string is held back until the next tokens decide.
    """

    def __init__(
        self,
        decoder: Decoder | None,
        rules: StopRules,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
        kept_ids: Set[int] = frozenset(),
    ) -> None:
        """The text continues that of the prompt, so its first token keeps a leading space.

        `kept_ids` are special tokens that are part of the text nevertheless.

        Without a decoder (a checkpoint without tokenizer) the text stays empty, and only ids and length stop.
        """
        self.rules = rules
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._detokenizer = (
            None if decoder is None else Detokenizer(decoder, skip_special_tokens, prompt_token_ids, kept_ids)
        )
        # Without stop strings no decision depends on the text, so decoding waits until the text is read, and `generate`
        # decodes an answer in one call. Most tokens then only have to be kept, which runs for each answer of each step.
        self._num_read = 0
        self._drops_last = False
        self.end_ids = rules.eos_ids | rules.stop_ids
        self._num_kept_only = 0 if rules.stop_strings else rules.max_tokens - 1
        self._shown: list[str] = []
        self._num_taken = 0
        self._held = ""

    @property
    def text(self) -> str:
        """The text that is final so far; after the end, the whole answer."""
        self._read()
        return "".join(self._shown)

    def take_delta(self) -> str:
        """The text that has become final since the last call."""
        self._read()
        delta = "".join(self._shown[self._num_taken :])
        self._num_taken = len(self._shown)
        return delta

    @property
    def num_unchecked(self) -> int:
        """The tokens that can be added to `token_ids` directly, as no rule applies to them if none is in `end_ids`."""
        return 0 if self.finish_reason is not None else self._num_kept_only - len(self.token_ids)

    def append(self, token_id: int) -> FinishReason | None:
        """Appends the next token; returns the reason if it ends the sequence, else None."""
        if self.finish_reason is not None:
            raise AssertionError("SequenceText: a token was appended to a finished sequence")
        token_ids = self.token_ids
        token_ids.append(token_id)
        if token_id not in self.end_ids and len(token_ids) <= self._num_kept_only:
            return None
        ends = self._may_stop and token_id in self.end_ids
        # The token that ends the answer is not part of its text, unless the rules keep it.
        self._drops_last = ends and not self.rules.keeps_stop
        if self.rules.stop_strings and not self._drops_last:
            self._read()
        if self.finish_reason is None and ends:
            self._finish("stop", None if token_id in self.rules.eos_ids else token_id)
        if self.finish_reason is None and len(token_ids) >= self.rules.max_tokens:
            self._finish("length", None)
        return self.finish_reason

    def abort(self, reason: str | None = None) -> None:
        """Ends the sequence from outside and keeps its text so far; `reason` becomes its `stop_reason`.

        A finished sequence does not change.
        """
        if self.finish_reason is None:
            self._read()
        if self.finish_reason is None:  # the text read last may have completed a stop string
            self._show(self._held)
            self._end("abort", reason)

    @property
    def _may_stop(self) -> bool:
        return len(self.token_ids) > self.rules.min_tokens

    def _read(self) -> None:
        """Decodes the tokens that are not text yet."""
        tokens = self._take_unread()
        if tokens and self._detokenizer is not None:
            self._grow(self._detokenizer.extend(tokens) if len(tokens) > 1 else self._detokenizer.append(tokens[0]))

    def _take_unread(self) -> list[int]:
        """The tokens that are not text yet, which then count as read."""
        end = len(self.token_ids) - self._drops_last
        tokens = self.token_ids[self._num_read : end]
        self._num_read = end
        return tokens

    def _grow(self, new: str) -> None:
        """Shows the final part of the held and the new text, and ends the sequence at a stop string in it."""
        stops = self.rules.stop_strings
        if not stops:
            self._show(new)
            return
        text = self._held + new
        match = find_stop(text, stops, len(self._held)) if new and self._may_stop else None
        if match is not None:
            self._show(text[: match.start + (len(match.stop) if self.rules.keeps_stop else 0)])
            self._end("stop", match.stop)
            return
        num_final = visible_len(text, stops)
        self._show(text[:num_final])
        self._held = text[num_final:]

    def _finish(self, reason: FinishReason, stop_reason: int | None) -> None:
        """Ends the sequence, unless the bytes of an incomplete character at the end complete a stop string.

        In that case `_grow` has ended it, with the stop string as the reason.
        """
        tokens = self._take_unread()
        self._grow("" if self._detokenizer is None else self._detokenizer.flush(tokens))
        if self.finish_reason is None:
            self._show(self._held)
            self._end(reason, stop_reason)

    def _end(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self._held = ""
        self.finish_reason, self.stop_reason = reason, stop_reason

    def _show(self, text: str) -> None:
        if text:
            self._shown.append(text)
