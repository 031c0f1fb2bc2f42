"""Strict YAML reader: a small, safe subset in which every value keeps its file, line and column.

Values are built from parser events by our own rules, because the usual loaders turn `off` into False, `010` into 8 and
`1e-6` into text, keep the last of two equal keys, follow aliases, and raise errors of many kinds.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sageLLM.codegen.diagnostics import Diagnostic, Span, SpecErrors

MAX_BYTES = 256 * 1024
MAX_DEPTH = 64
MAX_DIGITS = 18

YamlPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?\Z")
_CONSTANTS = {"true": True, "false": False, "null": None, "~": None, "": None}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Document:
    """One spec file: plain data, and the location of every value and key."""

    file: str
    text: str
    data: Any
    spans: Mapping[YamlPath, Span] = field(repr=False)
    key_spans: Mapping[YamlPath, Span] = field(repr=False)
    text_starts: Mapping[YamlPath, tuple[int, int]] = field(repr=False)

    def span(self, *path: str | int) -> Span:
        """The location of the value at `path`, or of the closest value around it."""
        return self._closest(self.spans, path)

    def key_span(self, *path: str | int) -> Span:
        """The location of the key at `path` (of the item in a list), or of the closest value around it."""
        return self.key_spans[path] if path in self.key_spans else self._closest(self.spans, path)

    def text_span(self, path: YamlPath, offset: int, width: int = 1) -> Span:
        """The location of a part of the text value at `path`; `offset` counts characters of the value."""
        start = self.text_starts.get(path)
        if start is None:
            return self.span(*path)
        value: Any = self.data
        for step in path:
            value = value[step]
        before = str(value)[:offset]
        line, column = start
        if "\n" not in before:
            first = self.spans[path]
            return Span(self.file, line, column + len(before) if line != first.line else column + offset, width)
        indent = column
        return Span(self.file, line + before.count("\n"), indent + len(before) - before.rfind("\n") - 1, width)

    def key_text_span(self, path: YamlPath, offset: int, width: int = 1) -> Span:
        """A place inside the key at `path`, `offset` characters in."""
        key = self.key_span(*path)
        quote = int(key.width > len(str(path[-1])))
        return Span(self.file, key.line, key.column + quote + offset, width)

    def _closest(self, table: Mapping[YamlPath, Span], path: YamlPath) -> Span:
        while path and path not in table:
            path = path[:-1]
        return table.get(path, Span(self.file, 1, 1))


def load_document(path: Path, *, display: str) -> Document:
    """Reads one spec file. `display` is its name in diagnostics and generated headers."""
    return parse_document(_read_text(path, display), display=display)


def parse_document(text: str, *, display: str) -> Document:
    """Reads spec text. Raises SpecErrors on anything outside the subset."""
    builder = _Builder(text, display)
    try:
        data = builder.document(yaml.parse(text, Loader=_LOADER))
    except yaml.MarkedYAMLError as error:
        span = _mark_span(error.problem_mark or error.context_mark, text, display)
        problem = str(error.problem or error.context)
        raise _failure("SAGE001", f"not valid YAML: {problem}", span, yaml_help(text, span, problem)) from None
    except (yaml.YAMLError, UnicodeError) as error:
        reason = getattr(error, "reason", None) or "a character or escape is not allowed"
        help = "remove control characters, and escapes that YAML does not know"
        raise _failure("SAGE001", f"not valid YAML: {reason}", Span(display, 1, 1), help) from None
    return Document(display, text, data, builder.spans, builder.key_spans, builder.text_starts)


def yaml_help(text: str, span: Span, problem: str) -> str:
    """The remedy for text that is not YAML; most often a text in `{...}` that lacks quotes."""
    line = text.split("\n")[span.line - 1]
    if "\\t" in problem or line.startswith("\t"):
        return "indent with spaces"
    types = _UNQUOTED_TYPE.findall(line)
    if types:
        return f'quote it: "{types[0]}"'
    if (found := _COLON.match(line)) and "mapping values are not allowed" in problem:
        return f'quote it: `{found[1]}: "{found[2]}"`'
    if "mapping values are not allowed" in problem:
        return "quote the text that contains a colon, or indent the line as its neighbours"
    if any(words in problem for words in ("',' or '}'", "',' or ']'", "cannot start any token", "block mapping")):
        return "quote texts that contain any of : , [ ] { } # & * ! | > % @ `, and close every bracket"
    return "check quotes, brackets and indentation of this line and the one before"


def _mark_span(mark: Any, text: str, file: str) -> Span:
    """The location at which the parser stopped; past the end of the text, the end of the last line."""
    lines = text.split("\n")
    if mark is None:
        return Span(file, 1, 1)
    if mark.line >= len(lines):
        return Span(file, len(lines), len(lines[-1]) + 1)
    return Span(file, mark.line + 1, mark.column + 1)


def _read_text(path: Path, display: str) -> str:
    start = Span(display, 1, 1)
    try:
        raw = path.read_bytes()
    except OSError as error:
        help = "check the path and its permissions"
        raise _failure("SAGE002", f"cannot be read: {error.strerror}", start, help) from None
    if len(raw) > MAX_BYTES:
        raise _failure(
            "SAGE003", f"a spec file must have at most {MAX_BYTES} bytes, got {len(raw)}", start, "split the file"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _failure("SAGE001", "not valid UTF-8 text", Span(display, line, 1), "save the file as UTF-8") from None


def _failure(code: str, message: str, span: Span, help: str) -> SpecErrors:
    return SpecErrors([Diagnostic(code, message, span, help)])


_COLON = re.compile(r"""\s*([\w-]+): ([^"'{\[|>].*: .*\S)\s*$""")
"""A text with a colon and a space, which YAML reads as a key."""
_UNQUOTED_TYPE = re.compile(r"""(?<!["'\w])([A-Za-z]\w*\[[^\]"']*\])(?!["'])""")
"""A type with dims, `E[..., H]`, that YAML reads as the beginning of a list."""


class _Builder:
    """Builds plain data from parser events and records the location of each value."""

    def __init__(self, text: str, file: str) -> None:
        self.lines = text.split("\n")
        self.file = file
        self.spans: dict[YamlPath, Span] = {}
        self.key_spans: dict[YamlPath, Span] = {}
        self.text_starts: dict[YamlPath, tuple[int, int]] = {}

    def document(self, events: Iterator[Any]) -> Any:
        next(events)  # the stream starts
        if isinstance(next(events), yaml.StreamEndEvent):
            raise _failure("SAGE004", "the file is empty", Span(self.file, 1, 1), "begin with `schema: ops/v1`")
        data = self._node(next(events), events, ())
        next(events)  # the document ends
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _failure("SAGE004", "a spec file must be one document", self._span(after), "split the file")
        return data

    def _node(self, event: Any, events: Iterator[Any], path: YamlPath) -> Any:
        span = self._span(event)
        self.spans[path] = span
        if len(path) > MAX_DEPTH:
            message = f"values must be nested at most {MAX_DEPTH} levels deep"
            raise _failure("SAGE003", message, span, "remove brackets")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _failure("SAGE005", "anchors and aliases are not allowed", span, "write the value out")
        if event.tag is not None:
            raise _failure("SAGE005", f"the tag '{event.tag}' is not allowed", span, "write the plain value")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(events, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, path)
        return self._scalar(event, path)

    def _mapping(self, events: Iterator[Any], path: YamlPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._key(event)
            here = (*path, key)
            if key in result:
                first = ("first defined here", self.key_spans[here])
                found = Diagnostic("SAGE006", f"duplicate key '{key}'", self._span(event), "keep one", (first,))
                raise SpecErrors([found])
            self.key_spans[here] = self._span(event)
            result[key] = self._node(next(events), events, here)
        return result

    def _sequence(self, events: Iterator[Any], path: YamlPath) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            result.append(self._node(event, events, (*path, len(result))))
        return result

    def _key(self, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
            help = "write a name before the colon; quote a key with brackets"
            raise _failure("SAGE007", "a key must be plain text", self._span(event), help)
        if not event.value or "\n" in event.value:
            raise _failure(
                "SAGE007", "a key must be one line of text", self._span(event), "write a name before the colon"
            )
        return str(event.value)

    def _scalar(self, event: Any, path: YamlPath) -> Any:
        if not event.style:  # plain, neither quoted nor a block
            value = self._plain(event)
            if isinstance(value, str):
                self.text_starts[path] = (event.start_mark.line + 1, event.start_mark.column + 1)
            return value
        self.text_starts[path] = self._text_start(event)
        return str(event.value)

    def _plain(self, event: Any) -> Any:
        text: str = event.value
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INT.match(text):
            if len(text) > MAX_DIGITS:
                message = f"an integer must have at most {MAX_DIGITS} digits"
                raise _failure("SAGE008", message, self._span(event), "write a float, or quote it if it is a text")
            return int(text)
        if _FLOAT.match(text):
            return self._float(text, event)
        return text

    def _float(self, text: str, event: Any) -> float:
        value = float(text) if len(text) <= 40 else float("inf")
        if value in (float("inf"), float("-inf")):
            help = "use a number of at most 1.7e308"
            raise _failure("SAGE008", "a number must fit a 64-bit float", self._span(event), help)
        return value

    def _text_start(self, event: Any) -> tuple[int, int]:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        if event.style in ("'", '"'):
            return line, column + 1
        first = next((text for text in self.lines[line:] if text.strip()), "")
        return line + 1, len(first) - len(first.lstrip(" ")) + 1

    def _span(self, event: Any) -> Span:
        start, end = event.start_mark, event.end_mark
        width = end.column - start.column if end.line == start.line else 1
        return Span(self.file, start.line + 1, start.column + 1, max(1, width))
