"""Parsers of answers: they divide the text of an answer into content, reasoning and tool calls while it grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from sageLLM.runtime.core.dialects.events import CallStart, Content, Event, Thought
from sageLLM.runtime.core.dialects.parser import DialectParser


class ParsedText(NamedTuple):
    """A part of an answer, of one kind. `tool_calls` are entries of a chunk's `tool_calls`, in OpenAI's form."""

    content: str = ""
    reasoning: str = ""
    tool_calls: Sequence[dict[str, Any]] = ()


class OutputParser(Protocol):
    """The parser of one answer. For every division of the text into pieces, the parts joined are the same.

    `has_called` tells whether the answer has tool calls so far, which decides between the finish reasons "stop" and
    "tool_calls". `is_reasoning` tells whether the text so far ends with reasoning.
    """

    has_called: bool
    is_reasoning: bool

    def feed(self, text: str) -> list[ParsedText]:
        """The parts that a piece of text decides, in order."""

    def finish(self) -> list[ParsedText]:
        """The text that was held back because it could have become a mark."""


class PlainParser:
    """All text is content."""

    has_called = False
    is_reasoning = False

    def feed(self, text: str) -> list[ParsedText]:
        return [ParsedText(content=text)] if text else []

    def finish(self) -> list[ParsedText]:
        return []


class CallParser:
    """The parts that a dialect's parser finds. `max_calls` limits the calls; further ones are left out."""

    def __init__(self, parser: DialectParser, *, in_reasoning: bool = False, max_calls: int | None = None) -> None:
        self.has_called = False
        self.is_reasoning = in_reasoning
        self._parser, self._max_calls = parser, max_calls

    def feed(self, text: str) -> list[ParsedText]:
        return list(self._parts(self._parser.feed(text)))

    def finish(self) -> list[ParsedText]:
        return list(self._parts(self._parser.finish()))

    def _parts(self, events: Iterable[Event]) -> Iterable[ParsedText]:
        for event in events:
            self.is_reasoning = isinstance(event, Thought)
            match event:
                case Content(text):
                    yield ParsedText(content=text)
                case Thought(text):
                    yield ParsedText(reasoning=text)
                case _ if self._max_calls is None or event.index < self._max_calls:
                    self.has_called = True
                    yield ParsedText(tool_calls=[_entry(event)])


class FormParser:
    """Reasoning by the dialect's parser, and then structured output, in which nothing is a mark."""

    has_called = False

    def __init__(self, parser: CallParser) -> None:
        self._parser: CallParser | None = parser
        self.is_reasoning = parser.is_reasoning

    def feed(self, text: str) -> list[ParsedText]:
        parts: list[ParsedText] = []
        for position, char in enumerate(text):
            if self._parser is None:
                return [*parts, ParsedText(content=text[position:])]
            parts += self._parser.feed(char)
            self.is_reasoning = self._parser.is_reasoning
            if parts and parts[-1].content:
                parts += self.finish()
        return parts

    def finish(self) -> list[ParsedText]:
        parser, self._parser = self._parser, None
        return [] if parser is None else parser.finish()


def _entry(event: Event) -> dict[str, Any]:
    """The first entry of a call has its id and name, further ones have pieces of the arguments."""
    if isinstance(event, CallStart):
        function = {"name": event.name, "arguments": ""}
        return {"index": event.index, "id": event.id, "type": "function", "function": function}
    assert not isinstance(event, Content | Thought)
    return {"index": event.index, "function": {"arguments": event.text}}
