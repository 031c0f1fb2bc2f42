"""Linked dialects: patterns are parsed, and hold what reading, writing and constraining require."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sageLLM.codegen.load import Entry
    from sageLLM.codegen.schema.dialects import DialectFile


@dataclass(frozen=True, slots=True)
class Element:
    """A part of a pattern: a text, an optional text (`maybe`), or a hole with its name as `text`."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class FormDef:
    """The parsed call of a form; the other texts are those of the spec."""

    call: tuple[Element, ...]
    open: str
    separator: str
    close: str
    at_start: bool


@dataclass(frozen=True, slots=True)
class DialectDef:
    """One dialect with its parsed patterns; the rest is in the entry."""

    entry: "Entry[DialectFile]"
    forms: tuple[FormDef, ...]
    each: tuple[Element, ...]
    block: tuple[str, str] | None

    @property
    def name(self) -> str:
        return self.entry.name
