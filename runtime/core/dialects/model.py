"""Dialects: descriptions of how the models of a family mark reasoning and tool calls in their answers.

A pattern is a tuple of literal texts and holes. Whitespace in a literal matches any whitespace, or none; next to
`Hole.VALUE` it matches itself, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Hole(Enum):
    """The variable parts of patterns."""

    NAME = "name"  # the name of the function
    ARGUMENTS = "arguments"  # a JSON object, or a series of the pattern `Arguments.each`
    OBJECT = "object"  # a JSON object with the name and the arguments, see ObjectKeys
    ID = "id"  # the id of the call
    INDEX = "index"  # the number of the call, from 0
    KEY = "key"  # the name of an argument
    VALUE = "value"  # its value: a text as it is, any other value as JSON
    PYTHON = "python"  # its value, as a Python literal
    TEXT = "text"  # reasoning


@dataclass(frozen=True, slots=True)
class Maybe:
    """A literal that may be absent. It is written, and optional when reading."""

    text: str


Pattern = tuple[str | Maybe | Hole, ...]


@dataclass(frozen=True, slots=True)
class ObjectKeys:
    """The keys of `Hole.OBJECT`; other keys are ignored."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments that are not one JSON object: `each` is repeated, with `separator` in between."""

    each: Pattern
    separator: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to write calls: `open`, the calls with `separator` in between, `close`.

    With `at_start`, calls are read at the beginning of the content only, and only of known functions.
    """

    call: Pattern
    open: str = ""
    separator: str = ""
    close: str = ""
    at_start: bool = False


@dataclass(frozen=True, slots=True)
class Calls:
    """Tool calls. All forms are read; the first one is written and constrained.

    `detect` are texts in the chat templates of the family. `ids` is the pattern of new ids, with {hex}, {alnum9},
    {name} and {index}.
    """

    detect: tuple[str, ...]
    forms: tuple[Form, ...]
    keys: ObjectKeys | None = None
    arguments: Arguments | None = None
    ids: str = "chatcmpl-tool-{hex}"

    def literals(self) -> list[str]:
        """The texts of all patterns."""
        patterns = [form.call for form in self.forms] + ([self.arguments.each] if self.arguments else [])
        parts = [part for pattern in patterns for part in pattern]
        marks = [text for form in self.forms for text in (form.open, form.separator, form.close)]
        texts = (part.text if isinstance(part, Maybe) else part for part in parts if not isinstance(part, Hole))
        return [*marks, *texts]


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Blocks of reasoning: `open`, the text, `close`. `then` is written before what follows, and is left out."""

    detect: tuple[str, ...]
    open: str
    close: str
    then: str = ""


@dataclass(frozen=True, slots=True)
class Dialect:
    """`aliases` are other names in commands; the literals of `skip` mark other things, and are left out of the text."""

    name: str
    summary: str
    aliases: tuple[str, ...] = ()
    calls: Calls | None = None
    reasoning: Reasoning | None = None
    skip: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)
