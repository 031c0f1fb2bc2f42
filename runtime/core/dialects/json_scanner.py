"""Finds the end of a JSON value in text that arrives in pieces, and repairs raw control characters in strings."""

from __future__ import annotations

import json
import re

MAX_DEPTH = 128
_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})\Z')
_ESCAPE_START = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_WORD = re.compile(r"[-+.0-9a-zA-Z]*")
_WHOLE_WORD = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


class JsonScanner:
    """Scans one value. `scan` returns the part of a text that belongs to it, as valid JSON.

    The result does not depend on the division of the text into pieces. Numbers, literals and escapes are returned when
    they are complete, so that the parts joined are always the beginning of a value.
    """

    def __init__(self, *, is_object: bool = False) -> None:
        self.is_done = self.has_failed = False
        self._closers: list[str] = []
        self._next = "object" if is_object else "value"
        self.held = ""  # an incomplete escape, number or literal, which has been read and not returned

    def scan(self, text: str) -> tuple[str, int]:
        """The JSON of a prefix of `text`, and the prefix's length. It ends where the value does, or at a mistake."""
        parts: list[str] = []
        position = 0
        while position < len(text) and not self.is_done and not self.has_failed:
            step = getattr(self, f"_in_{self._next}")
            part, position = step(text, position)
            parts.append(part)
        return "".join(parts), position

    def finish(self) -> str:
        """Ends the text, which completes a number or literal at its end."""
        part = self._end_word() if self._next == "word" else ""
        self.has_failed = not self.is_done
        return part

    # Each step reads one or more characters, and returns their JSON and the new position.

    def _in_object(self, text: str, at: int) -> tuple[str, int]:
        if text[at] != "{":
            return self._fail(at)
        return self._in_value(text, at)

    def _in_value(self, text: str, at: int) -> tuple[str, int]:
        match text[at]:
            case " " | "\t" | "\r" | "\n":
                return self._space(text, at)
            case "{" | "[" as char:
                if len(self._closers) >= MAX_DEPTH:
                    return self._fail(at)
                self._closers.append("}" if char == "{" else "]")
                self._next = "first_key" if char == "{" else "first_value"
                return char, at + 1
            case '"':
                self._next = "string"
                return '"', at + 1
        self._next = "word"
        return self._in_word(text, at)

    def _in_first_value(self, text: str, at: int) -> tuple[str, int]:
        if text[at] == "]":
            return self._close(text, at)
        return self._in_value(text, at)

    def _in_first_key(self, text: str, at: int) -> tuple[str, int]:
        if text[at] == "}":
            return self._close(text, at)
        return self._in_key(text, at)

    def _in_key(self, text: str, at: int) -> tuple[str, int]:
        if text[at] == '"':
            self._next = "key_string"
            return '"', at + 1
        return self._space(text, at)

    def _in_colon(self, text: str, at: int) -> tuple[str, int]:
        if text[at] == ":":
            self._next = "value"
            return ":", at + 1
        return self._space(text, at)

    def _in_more(self, text: str, at: int) -> tuple[str, int]:
        """After a value inside an object or list."""
        if text[at] == ",":
            self._next = "key" if self._closers[-1] == "}" else "value"
            return ",", at + 1
        if text[at] == self._closers[-1]:
            return self._close(text, at)
        return self._space(text, at)

    def _in_key_string(self, text: str, at: int) -> tuple[str, int]:
        return self._string(text, at, "colon")

    def _in_string(self, text: str, at: int) -> tuple[str, int]:
        return self._string(text, at, "more")

    def _string(self, text: str, at: int, following: str) -> tuple[str, int]:
        char = text[at]
        if self.held or char == "\\":
            return self._escape(char, at)
        if char == '"':
            self._next = following
            if following == "more":
                self._end_value()
            return '"', at + 1
        if char < " ":
            return json.dumps(char)[1:-1], at + 1
        found = _PLAIN.match(text, at)
        assert found is not None, "the pattern matches the empty text"
        return found[0], found.end()

    def _escape(self, char: str, at: int) -> tuple[str, int]:
        held = self.held + char
        if _ESCAPE.match(held):
            self.held = ""
            return held, at + 1
        if not _ESCAPE_START.match(held):
            return self._fail(at)
        self.held = held
        return "", at + 1

    def _in_word(self, text: str, at: int) -> tuple[str, int]:
        """A number, true, false or null, which the first other character ends."""
        found = _WORD.match(text, at)
        assert found is not None, "the pattern matches the empty text"
        self.held += found[0]
        return ("" if found.end() == len(text) else self._end_word()), found.end()

    def _end_word(self) -> str:
        word = self.held
        if not _WHOLE_WORD.fullmatch(word):
            self.has_failed = True
            return ""
        self.held, self._next = "", "more"
        self._end_value()
        return word

    def _space(self, text: str, at: int) -> tuple[str, int]:
        found = _SPACE.match(text, at)
        assert found is not None, "the pattern matches the empty text"
        return (found[0], found.end()) if found[0] else self._fail(at)

    def _close(self, text: str, at: int) -> tuple[str, int]:
        self._closers.pop()
        self._next = "more"
        self._end_value()
        return text[at], at + 1

    def _end_value(self) -> None:
        self.is_done = not self._closers

    def _fail(self, at: int) -> tuple[str, int]:
        self.has_failed = True
        return "", at
