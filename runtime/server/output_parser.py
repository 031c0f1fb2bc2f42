"""Parsers of answers: they divide the text of an answer into content, reasoning and tool calls while it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ParsedText:
    """The parts of a piece of text. `tool_calls` are entries of a chunk's `tool_calls`, in OpenAI's form."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.content or self.reasoning or self.tool_calls)


class OutputParser(Protocol):
    """The parser of one answer. For every division of the text into pieces, the parts joined are the same.

    `has_called` tells whether the answer has tool calls so far, which decides between the finish reasons "stop" and
    "tool_calls".
    """

    has_called: bool

    def feed(self, text: str) -> ParsedText: ...

    def finish(self) -> ParsedText:
        """The text that was held back because it could have become a marker."""


class PlainParser:
    """All text is content."""

    has_called = False

    def feed(self, text: str) -> ParsedText:
        return ParsedText(content=text)

    def finish(self) -> ParsedText:
        return ParsedText()
