"""Reads one tool call by the patterns of its dialect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sageLLM.runtime.core.dialects.json_scanner import JsonScanner
from sageLLM.runtime.core.dialects.literals import dump, is_text, json_of_text, python_value
from sageLLM.runtime.core.dialects.model import Arguments, Calls, Form, Hole, Maybe, Pattern
from sageLLM.runtime.core.dialects.source import Mismatch, Reading, Source, read_text, tail_space

NAME = re.compile(r"[A-Za-z0-9_.-]+")
ID = re.compile(r"[A-Za-z0-9_.:-]+")
_DIGITS = re.compile(r"[0-9]+")
_KEY = re.compile(r'[^<>"=\n(){}\[\],]+')

Tools = Mapping[str, Mapping[str, Any]]
"""The schemas of the parameters of known functions, by name."""


class Listener(Protocol):
    """The receiver of a call: `announce` returns its index, under which pieces of its arguments follow."""

    def announce(self, calls: Calls, name: str, id: str | None) -> int: ...

    def emit_arguments(self, index: int, text: str) -> None: ...


class CallReader:
    """One call. It is announced when its name is known and its arguments have begun."""

    def __init__(self, source: Source, form: Form, calls: Calls, tools: Tools, listener: Listener) -> None:
        self._source, self._form, self._calls = source, form, calls
        self._tools, self._listener = tools, listener
        self._name = ""
        self._id: str | None = None
        self._index: int | None = None

    @property
    def is_announced(self) -> bool:
        return self._index is not None

    def read(self) -> Reading[None]:
        """Raises Mismatch where the text does not continue as the pattern requires."""
        source = self._source
        for element in self._form.call:
            match element:
                case str():
                    yield from source.expect(element)
                case Maybe(text):
                    yield from source.skip(text)
                case Hole.NAME:
                    self._name = yield from self._run(NAME)
                case Hole.ID:
                    self._id = yield from self._run(ID)
                case Hole.INDEX:
                    yield from self._run(_DIGITS)
                case Hole.OBJECT:
                    yield from self._object()
                case Hole.ARGUMENTS if self._calls.arguments is None:
                    yield from self._begin_object()
                    self._announce()
                    yield from self._json(JsonScanner(is_object=True), self._emit)
                case Hole.ARGUMENTS:
                    assert self._calls.arguments is not None
                    yield from self._series(self._calls.arguments)
        if not self.is_announced:
            self._announce()
            self._emit("{}")

    def _run(self, run: re.Pattern[str]) -> Reading[str]:
        """A word. Raises Mismatch if there is none."""
        if text := (yield from self._source.take_run(run)):
            return text
        raise Mismatch(self._source.position)

    def _announce(self) -> None:
        if self._form.at_start and self._tools and self._name not in self._tools:
            raise Mismatch(self._source.position)
        self._index = self._listener.announce(self._calls, self._name, self._id)

    def _emit(self, text: str) -> None:
        assert self._index is not None, "arguments follow the announcement"
        self._listener.emit_arguments(self._index, text)

    # --- JSON ---

    def _begin_object(self) -> Reading[None]:
        yield from self._source.skip_space()
        if (yield from self._source.peek()) != "{":
            raise Mismatch(self._source.position)

    def _json(self, scanner: JsonScanner, emit: Callable[[str], None]) -> Reading[None]:
        """One value."""
        source = self._source
        while not scanner.is_done:
            if not (yield from source.peek()):
                emit(scanner.finish() or scanner.held)
                break
            text, num_read = scanner.scan(source.rest())
            source.position += num_read
            emit(text)
            if scanner.has_failed:
                raise Mismatch(source.position - len(scanner.held))
            if self.is_announced:
                source.keep(len(scanner.held))
        if not scanner.is_done:
            raise Mismatch(source.position)

    def _value(self) -> Reading[Any]:
        parts: list[str] = []
        yield from self._json(JsonScanner(), parts.append)
        return json.loads("".join(parts))

    def _object(self) -> Reading[None]:
        """A JSON object with the name and the arguments. Arguments before the name are held."""
        source, keys = self._source, self._calls.keys
        assert keys is not None, "a form with an object has its keys, which the generator checks"
        held: list[str] = []
        yield from self._begin_object()
        char = "{"
        while char != "}":
            source.position += 1
            key = yield from self._object_key()
            if key == keys.arguments:
                yield from self._object_arguments(held)
            else:
                self._note(key, (yield from self._value()))
            if self._name and held and not self.is_announced:
                self._announce()
                self._emit("".join(held))
            yield from source.skip_space()
            char = yield from source.peek()
            if char not in (",", "}"):
                raise Mismatch(source.position)
        source.position += 1
        if not self._name:
            raise Mismatch(source.position)

    def _object_key(self) -> Reading[str]:
        source = self._source
        yield from source.skip_space()
        if (yield from source.peek()) != '"':
            raise Mismatch(source.position)
        key: str = yield from self._value()
        yield from source.skip_space()
        yield from source.expect(":")
        yield from source.skip_space()
        return key

    def _object_arguments(self, held: list[str]) -> Reading[None]:
        yield from self._begin_object()
        if held or self.is_announced:
            raise Mismatch(self._source.position)  # arguments twice
        if self._name:
            self._announce()
        yield from self._json(JsonScanner(is_object=True), self._emit if self._name else held.append)

    def _note(self, key: str, value: object) -> None:
        """Other keys than those of name and id are ignored."""
        keys = self._calls.keys
        assert keys is not None
        if key == keys.name:
            if not isinstance(value, str) or not NAME.fullmatch(value):
                raise Mismatch(self._source.position)
            self._name = self._name or value
        elif key == keys.id and isinstance(value, str) and ID.fullmatch(value):
            self._id = value

    # --- arguments one by one ---

    def _series(self, arguments: Arguments) -> Reading[None]:
        """Arguments by the pattern `each`, as a JSON object."""
        source = self._source
        head, hole, tail = divided(arguments.each)
        schemas = self._tools.get(self._name, {}).get("properties")
        opening = "{"
        while True:
            start = source.position
            try:
                if self.is_announced:
                    yield from source.expect(arguments.separator)
                key = yield from self._head(head, hole)
            except Mismatch:
                source.position = start
                break
            if not self.is_announced:
                self._announce()
            self._emit(f"{opening}{dump(key)}: ")
            schema = schemas.get(key) if isinstance(schemas, Mapping) else None
            yield from self._python() if hole is Hole.PYTHON else self._text(tail, schema)
            opening = ", "
            source.keep()
        if self.is_announced:
            self._emit("}")

    def _head(self, head: Pattern, hole: Hole) -> Reading[str]:
        """Reads up to the value; returns the argument's name."""
        source, key = self._source, ""
        for element in head:
            if isinstance(element, str):
                space = tail_space(element) if hole is Hole.VALUE and element is head[-1] else ""
                yield from source.expect(element.removesuffix(space))
                yield from source.skip_exactly(space)
            else:
                key = (yield from self._run(_KEY)).strip()
        return key

    def _text(self, tail: str, schema: object) -> Reading[None]:
        """A value that is written as it is. Texts are emitted while they grow, others when they are complete."""
        source = self._source
        if is_text(schema):
            self._emit('"')
            is_whole = yield from read_text(source, tail, lambda text: self._emit(dump(text)[1:-1]), is_exact=True)
            if not is_whole:
                raise Mismatch(source.position)
            self._emit('"')
            return
        if (value := (yield from self._json_before(tail, schema))) is not None:
            self._emit(value)
            return
        parts: list[str] = []
        is_whole = yield from read_text(source, tail, parts.append, is_exact=True)
        text = "".join(parts)
        self._emit(json_of_text(text, schema) if is_whole else dump(text)[:-1])
        if not is_whole:
            raise Mismatch(source.position)

    def _json_before(self, tail: str, schema: object) -> Reading[str | None]:
        """A list, object or text in JSON up to the mark, which may occur within it; None if the value is another."""
        source, scanner = self._source, JsonScanner()
        start = source.keep()
        parts: list[str] = []
        char = yield from source.peek()
        while char and (parts or char in '[{"') and not scanner.is_done and not scanner.has_failed:
            text, num_read = scanner.scan(source.rest())
            source.position += num_read
            parts.append(text)
            char = yield from source.peek()
        if scanner.is_done and (yield from source.skip(tail)):
            return json_of_text("".join(parts), schema)
        source.position = start
        return None

    def _python(self) -> Reading[None]:
        """A Python literal, up to a comma or bracket that does not belong to it."""
        source, quote, depth = self._source, "", 0
        start = source.keep()
        while char := (yield from source.peek()):
            if quote:
                if char == "\\":
                    source.position += 1
                    if not (yield from source.peek()):
                        break
                elif char == quote:
                    quote = ""
            elif char in "'\"":
                quote = char
            elif depth == 0 and char in ",)]}":
                break
            else:
                depth += (char in "([{") - (char in ")]}")
            source.position += 1
        try:
            self._emit(dump(python_value(source.slice(start))))
        except ValueError:
            raise Mismatch(start) from None


def divided(each: Pattern) -> tuple[Pattern, Hole, str]:
    """The pattern of an argument: the part before the value, the kind of value, and the literal after it."""
    at = next(i for i, element in enumerate(each) if element in (Hole.VALUE, Hole.PYTHON))
    hole = each[at]
    assert isinstance(hole, Hole)
    return each[:at], hole, "".join(text for text in each[at + 1 :] if isinstance(text, str))
