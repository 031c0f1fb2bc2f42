"""Scanner for the lines of the text form: a cursor that reads names, numbers, shapes and attribute values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sageLLM.runtime.core.errors import IRError, ParseError
from sageLLM.runtime.core.ir.dims import Dim, parse_dim
from sageLLM.runtime.core.ir.nodes import AttrValue

WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")

_Item = TypeVar("_Item")
_SPACE = re.compile(r" *")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(r"-?(?:inf|nan|\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_DIMS = re.compile(r"[^\]]*")
_CONSTANTS: Mapping[str, bool | None] = {"True": True, "False": False, "None": None}


class Scanner:
    """A cursor in one line; every failed read raises ParseError at the cursor."""

    def __init__(self, line: str, number: int) -> None:
        self.line, self.line_number, self.at = line.rstrip(), number, 0

    def error(self, message: str, at: int | None = None) -> ParseError:
        return ParseError(message, self.line_number, (self.at if at is None else at) + 1)

    def skip(self) -> None:
        self.at += len(self.match(_SPACE) or "")

    def match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.line, self.at)
        return found.group() if found else None

    def take(self, text: str) -> bool:
        """Moves past a token, and the spaces around it, if it comes next."""
        self.skip()
        if not self.line.startswith(text, self.at):
            return False
        self.at += len(text)
        self.skip()
        return True

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise self.error(f"expected {text!r}, got {self.rest()}")

    def rest(self) -> str:
        return repr(self.line[self.at : self.at + 20]) if self.at < len(self.line) else "the end of the line"

    def is_done(self) -> bool:
        self.skip()
        return self.at == len(self.line)

    def word(self, expected: str) -> str:
        found = self.match(WORD)
        if found is None:
            raise self.error(f"expected {expected}, got {self.rest()}")
        self.at += len(found)
        return found

    def name(self, expected: str) -> str:
        return self.string() if self.line.startswith('"', self.at) else self.word(expected)

    def string(self) -> str:
        found = self.match(_STRING)
        try:
            value = json.loads(found or "")
        except ValueError:
            raise self.error("the string is not terminated or contains an invalid escape") from None
        self.at += len(found or "")
        return str(value)

    def number(self) -> int | float:
        found = self.match(_NUMBER)
        if found is None:
            raise self.error(f"expected a number, got {self.rest()}")
        self.at += len(found)
        return int(found) if found.lstrip("-").isdigit() else float(found)

    def integer(self) -> int:
        start = self.at
        value = self.number()
        if not isinstance(value, int):
            raise self.error(f"expected an integer, got {value}", start)
        return value

    def choice(self, label: str, choices: tuple[str, ...]) -> str:
        start = self.at
        found = self.word(label)
        if found not in choices:
            raise self.error(f"{label}: expected one of {', '.join(choices)}, got {found!r}", start)
        return found

    def items(self, item: Callable[[], _Item], close: str) -> list[_Item]:
        """Comma-separated items up to a closing token."""
        found: list[_Item] = []
        while not self.take(close):
            if found:
                self.expect(",")
            found.append(item())
        return found

    def names(self) -> list[str]:
        self.expect("[")
        return self.items(lambda: self.name("a name"), "]")

    def json(self) -> dict[str, Any]:
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.line, self.at)
        except ValueError:
            raise self.error("metadata is not JSON") from None
        if not isinstance(value, dict):
            raise self.error("metadata is not a JSON object")
        return value

    def dim(self, text: str, at: int) -> Dim:
        try:
            return parse_dim(text.strip())
        except IRError:
            raise self.error(f"{text.strip()!r} is not a dim formula", at) from None

    def shape(self) -> tuple[Dim, ...]:
        self.expect("[")
        text = self.match(_DIMS) or ""
        sizes: list[Dim] = []
        for part in text.split(",") if text.strip() else []:
            sizes.append(self.dim(part, self.at))
            self.at += len(part) + 1
        self.at -= 1 if sizes else 0
        self.expect("]")
        return tuple(sizes)

    def value(self) -> AttrValue:
        if self.take("("):
            return tuple(self.items(self.value, ")"))
        if self.line.startswith('"', self.at):
            return self.string()
        if self.take("`"):
            end = self.line.find("`", self.at)
            if end < 0:
                raise self.error("the dim formula must end with `")
            size = self.dim(self.line[self.at : end], self.at)
            self.at = end + 1
            return size
        word = self.match(WORD) or ""
        if word in _CONSTANTS:
            self.at += len(word)
            return _CONSTANTS[word]
        return self.number()
