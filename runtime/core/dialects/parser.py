"""Parses the text of an answer into content, reasoning and tool calls while it grows.

The result does not depend on the division of the text into pieces: decisions depend on characters alone, and text
that could be the beginning of a mark is held until it is decided. A call is announced once its name is known and its
arguments have begun; text that does not continue as the dialect requires is content from there on, so nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sageLLM.runtime.core.dialects.call_reader import CallReader, Tools
from sageLLM.runtime.core.dialects.events import CallArguments, CallStart, Content, Event, Thought, joined, new_id
from sageLLM.runtime.core.dialects.model import Calls, Dialect, Form, Hole, Reasoning
from sageLLM.runtime.core.dialects.source import SPACE, SPACES, Mismatch, Reading, Source, read_text

MakeId = Callable[[Calls, str, int], str]
Read = Callable[[], Reading[None]]


class DialectParser:
    """The parser of one answer. `calls` and `reasoning` may be of different dialects; None means that marks are text.

    `skip` are literals to leave out. With `in_reasoning`, the prompt has opened a block of reasoning. `tools` are the
    schemas of the parameters of known functions.
    """

    def __init__(
        self,
        calls: Calls | None,
        reasoning: Reasoning | None = None,
        skip: tuple[str, ...] = (),
        *,
        tools: Tools | None = None,
        in_reasoning: bool = False,
        make_id: MakeId = new_id,
    ) -> None:
        self.num_calls = 0
        self._tools, self._make_id = tools or {}, make_id
        self._source = Source()
        self._events: list[Event] = []
        self._space = ""  # whitespace that is content, unless a call or reasoning follows
        self._is_at_start = True
        self._is_after_call = False
        self._marks = list(self._marks_of(calls, reasoning, skip))
        firsts = "".join(dict.fromkeys(first for first, _ in self._marks))
        self._plain = re.compile(f"[^{re.escape(firsts + SPACE)}]+")
        self._reading = self._answer(reasoning if in_reasoning else None)

    @classmethod
    def of(cls, dialect: Dialect, **options: Any) -> DialectParser:
        """The parser of one dialect."""
        return cls(dialect.calls, dialect.reasoning, dialect.skip, **options)

    def feed(self, text: str) -> list[Event]:
        """Adds a piece of the answer; returns what it decides."""
        self._source.add(text)
        return self._go_on()

    def finish(self) -> list[Event]:
        """Ends the answer; returns what was held."""
        self._source.is_ended = True
        return self._go_on()

    def parse(self, text: str) -> list[Event]:
        """The parts of a whole answer."""
        return joined([*self.feed(text), *self.finish()])

    def _go_on(self) -> list[Event]:
        next(self._reading, None)
        events, self._events = joined(self._events), []
        return events

    # --- the answer ---

    def _marks_of(
        self, calls: Calls | None, reasoning: Reasoning | None, skip: tuple[str, ...]
    ) -> list[tuple[str, Read]]:
        """What can begin inside content: the first character of its mark, and its reader."""
        found: list[tuple[str, Read]] = []
        if reasoning is not None:
            found.append((_first(reasoning.open), lambda: self._block(reasoning)))
        if calls is not None:
            found += [(first_character(form), self._reader_of(form, calls)) for form in calls.forms]
        return found + [(_first(text), self._skipper_of(text)) for text in skip]

    def _reader_of(self, form: Form, calls: Calls) -> Read:
        return lambda: self._section(form, calls)

    def _skipper_of(self, text: str) -> Read:
        return lambda: self._source.expect(text)

    def _answer(self, opened: Reasoning | None) -> Reading[None]:
        source = self._source
        if opened is not None:
            yield from source.skip_space()
            yield from self._thoughts(opened)
        while char := (yield from source.peek()):
            start = source.keep()
            if text := source.take_now(self._plain):
                self._emit_content(text)
            elif char in SPACE:
                self._space += source.take_now(SPACES)
            elif not (yield from self._marked(char)):
                self._emit_content(source.slice(start))
        if not self._is_after_call:
            self._emit_content("")

    def _marked(self, char: str) -> Reading[bool]:
        """Reads what begins with a mark. If nothing does, the position is at the end of the text that is content."""
        start = self._source.position
        resume = start + 1
        for first, read in self._marks:
            if first == char:
                self._source.position = start
                try:
                    yield from read()
                except Mismatch as mismatch:
                    resume = max(resume, mismatch.resume)
                else:
                    return True
        self._source.position = resume
        return False

    def _emit_content(self, text: str) -> None:
        if text := self._space + text:
            self._events.append(Content(text))
            self._is_at_start = self._is_after_call = False
        self._space = ""

    # --- reasoning ---

    def _block(self, reasoning: Reasoning) -> Reading[None]:
        yield from self._source.expect(reasoning.open)
        self._space = ""
        yield from self._thoughts(reasoning)

    def _thoughts(self, reasoning: Reasoning) -> Reading[None]:
        """The text of a block that is not closed is reasoning up to the end of the answer."""
        yield from read_text(self._source, reasoning.close, lambda text: self._events.append(Thought(text)))

    # --- calls ---

    def _section(self, form: Form, calls: Calls) -> Reading[None]:
        """One or more calls. Raises Mismatch if there is none."""
        source = self._source
        if form.at_start and not self._is_at_start:
            raise Mismatch(source.position)
        yield from source.expect(form.open)
        is_whole = yield from self._call(form, calls)
        while is_whole:
            start = source.keep()
            try:
                yield from source.expect(form.separator)
                is_whole = yield from self._call(form, calls)
            except Mismatch:
                source.position = start
                break
        if is_whole and form.close:
            yield from source.skip(form.close)

    def _call(self, form: Form, calls: Calls) -> Reading[bool]:
        """Reads a call; False if it breaks off after it was announced. Raises Mismatch if it breaks off before."""
        reader = CallReader(self._source, form, calls, self._tools, self)
        try:
            yield from reader.read()
        except Mismatch as mismatch:
            if not reader.is_announced:
                raise
            self._source.position = mismatch.resume
            return False
        return True

    def announce(self, calls: Calls, name: str, id: str | None) -> int:
        """The index of a new call."""
        index = self.num_calls
        self.num_calls += 1
        self._space, self._is_at_start, self._is_after_call = "", False, True
        self._events.append(CallStart(index, id or self._make_id(calls, name, index), name))
        return index

    def emit_arguments(self, index: int, text: str) -> None:
        if text:
            self._events.append(CallArguments(index, text))


def _first(mark: str) -> str:
    return mark.lstrip()[0]


def first_character(form: Form) -> str:
    """The character that begins the calls of a form."""
    start = form.call[0]
    text = form.open.lstrip() or (start.lstrip() if isinstance(start, str) else "{" if start is Hole.OBJECT else "")
    assert text, "a form begins with a mark or with a JSON object, which the generator checks"
    return text[0]
