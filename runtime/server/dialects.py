"""Chooses the dialect of a checkpoint: by name, or by the texts of its chat template."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sageLLM.runtime.core.dialects.model import Calls, Dialect, Reasoning
from sageLLM.runtime.errors import SageError

Section = Literal["calls", "reasoning"]
NONE = "none"
FLAGS = {"calls": "--tool-call-parser", "reasoning": "--reasoning-parser"}
NOUNS = {"calls": "tool calls", "reasoning": "reasoning"}


@dataclass(frozen=True, slots=True)
class Choice:
    """The dialect of a section, or None; `reason` tells why."""

    section: Section
    dialect: Dialect | None
    reason: str

    def __str__(self) -> str:
        name = self.dialect.name if self.dialect is not None else NONE
        return f"{NOUNS[self.section]}: {name} ({self.reason})"


@dataclass(frozen=True, slots=True)
class ChosenDialects:
    """The dialects that answers are read by."""

    for_calls: Choice
    for_reasoning: Choice

    @property
    def calls(self) -> Calls | None:
        dialect = self.for_calls.dialect
        return None if dialect is None else dialect.calls

    @property
    def reasoning(self) -> Reasoning | None:
        dialect = self.for_reasoning.dialect
        return None if dialect is None else dialect.reasoning

    @property
    def skip(self) -> tuple[str, ...]:
        """The marks to leave out, of both dialects."""
        dialects = (self.for_calls.dialect, self.for_reasoning.dialect)
        return tuple(dict.fromkeys(text for one in dialects if one is not None for text in one.skip))

    def marks(self, *, with_calls: bool) -> str:
        """All marks in one text, in which to look for special tokens."""
        calls, reasoning = self.calls if with_calls else None, self.reasoning
        texts = list(self.skip)
        if reasoning is not None:
            texts += [reasoning.open, reasoning.close]
        if calls is not None:
            texts += calls.literals()
        return "\n".join(texts)


def choose_dialects(
    dialects: Mapping[str, Dialect], template: str, calls: str | None, reasoning: str | None
) -> ChosenDialects:
    """`calls` and `reasoning` are names, "none", or None for detection. Raises SageError for an unknown name."""
    return ChosenDialects(
        _choose(dialects, template, "calls", calls), _choose(dialects, template, "reasoning", reasoning)
    )


def _choose(dialects: Mapping[str, Dialect], template: str, section: Section, name: str | None) -> Choice:
    known = [one for one in dialects.values() if getattr(one, section) is not None]
    if name == NONE:
        return Choice(section, None, f"{FLAGS[section]} {NONE}")
    if name is not None:
        return Choice(section, _named(known, template, section, name), f"{FLAGS[section]} {name}")
    found = _detected(known, template, section)
    if found is None:
        return Choice(section, None, "no marks of a known dialect in the chat template")
    marks = ", ".join(repr(text) for text in getattr(found, section).detect)
    return Choice(section, found, f"the chat template has {marks}")


def _detected(dialects: list[Dialect], template: str, section: Section) -> Dialect | None:
    """The dialect with the most texts in the template, of those with all of them there."""
    fitting = [one for one in dialects if all(text in template for text in getattr(one, section).detect)]
    return max(fitting, key=lambda one: len(getattr(one, section).detect), default=None)


def _named(dialects: list[Dialect], template: str, section: Section, name: str) -> Dialect:
    """Of several dialects with a name, the detected one, else that whose own name it is."""
    found = [one for one in dialects if name in one.names]
    if not found:
        names = sorted({one for dialect in dialects for one in dialect.names})
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(names)}"
        raise SageError(f"{FLAGS[section]} must be a dialect or '{NONE}', got '{name}'; {hint}")
    return _detected(found, template, section) or next((one for one in found if one.name == name), found[0])
