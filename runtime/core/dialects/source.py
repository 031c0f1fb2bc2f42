"""Text that arrives in pieces, read by coroutines that pause while the next character is unknown."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from re import Pattern
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A coroutine that pauses until more text has been added, and returns T."""
SPACE = " \t\r\n"
SPACES = re.compile(f"[{SPACE}]+")


class Mismatch(Exception):
    """The text is not what a pattern requires; reading continues at `resume`."""

    def __init__(self, resume: int) -> None:
        super().__init__(resume)
        self.resume = resume


class Source:
    """Text with a position. Positions count from the beginning of the text; text before `keep` is forgotten."""

    def __init__(self) -> None:
        self.position = 0
        self.is_ended = False
        self._text = ""
        self._start = 0  # the position of the first character of _text
        self._kept = 0

    def add(self, text: str) -> None:
        self._text = self._text[self._kept - self._start :] + text
        self._start = self._kept

    def keep(self, num_before: int = 0) -> int:
        """The position. The reader may return to so many characters before it; earlier text is forgotten."""
        self._kept = self.position - num_before
        return self.position

    def peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while (index := self.position - self._start) >= len(self._text):
            if self.is_ended:
                return ""
            yield
        return self._text[index]

    def rest(self) -> str:
        """The text that has arrived and is not read yet."""
        return self._text[self.position - self._start :]

    def slice(self, start: int) -> str:
        """The text from `start` to the position."""
        return self._text[start - self._start : self.position - self._start]

    def take_now(self, run: Pattern[str]) -> str:
        """The longest run at the position in the text that has arrived."""
        found = run.match(self._text, self.position - self._start)
        text = found[0] if found else ""
        self.position += len(text)
        return text

    def take_run(self, run: Pattern[str]) -> Reading[str]:
        """The longest run, up to a character that does not belong to it, or the end."""
        parts = []
        while (yield from self.peek()):
            if not (part := self.take_now(run)):
                break
            parts.append(part)
        return "".join(parts)

    def skip_space(self) -> Reading[None]:
        while (char := (yield from self.peek())) and char in SPACE:
            self.position += 1

    def expect(self, text: str) -> Reading[None]:
        """Reads a literal; whitespace in it stands for any, also for none. Raises Mismatch."""
        start = self.position
        for char in text:
            if char in SPACE:
                yield from self.skip_space()
            elif (yield from self.peek()) == char:
                self.position += 1
            else:
                raise Mismatch(start)

    def skip(self, text: str) -> Reading[bool]:
        """Reads a literal if it follows."""
        start = self.position
        try:
            yield from self.expect(text)
        except Mismatch:
            self.position = start
            return False
        return True

    def skip_exactly(self, text: str) -> Reading[None]:
        """Skips the text if it follows, with whitespace as it is."""
        start = self.position
        for char in text:
            if (yield from self.peek()) != char:
                self.position = start
                return
            self.position += 1


def tail_space(text: str) -> str:
    """The whitespace at the end of a literal."""
    return text[len(text.rstrip(SPACE)) :]


def read_text(source: Source, closing: str, emit: Callable[[str], None], *, is_exact: bool = False) -> Reading[bool]:
    """Emits the text up to the literal `closing`, which is read too; returns False if the text ends before.

    Whitespace before the closing mark is left out; with `is_exact` only that which the literal begins with.
    """
    mark = closing.lstrip(SPACE)
    lead = closing.removesuffix(mark)
    other = re.compile(f"[^{re.escape(mark[0] + SPACE)}]+")
    space = ""
    while char := (yield from source.peek()):
        start = source.keep()
        if text := source.take_now(other):
            emit(space + text)
            space = ""
        elif char in SPACE:
            space += source.take_now(SPACES)
        elif (yield from source.skip(mark)):
            emit(space.removesuffix(lead) if is_exact else "")
            return True
        else:
            source.position = start + 1
            emit(space + char)
            space = ""
    emit(space)
    return False
