"""Diagnostics of specs: a code, a sentence, a source location and a remedy."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_NAMES = 24
"""The most names that a help line lists."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A location in a spec file. Lines and columns are counted from 1, `width` is in characters."""

    file: str
    line: int
    column: int
    width: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding: a stable code (see `codegen.codes`), a sentence, a location and the remedy.

    An error ends the run; a warning is printed after it.
    """

    code: str
    message: str
    span: Span | None = None
    help: str = ""
    related: tuple[tuple[str, Span], ...] = ()
    severity: Literal["error", "warning"] = "error"

    def __post_init__(self) -> None:
        assert self.help, f"every finding has a remedy: {self.code}: {self.message}"

    def __str__(self) -> str:
        place = f"{self.span}: " if self.span else ""
        return f"{place}{self.severity}[{self.code}]: {self.message}"


class SpecErrors(Exception):
    """All findings of one stage; the only exception that bad specs may raise."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = sorted(diagnostics, key=_position)
        super().__init__("\n".join(map(str, self.diagnostics)))


def _position(diagnostic: Diagnostic) -> tuple[str, int, int, str, str]:
    span = diagnostic.span or Span("", 0, 0)
    return (span.file, span.line, span.column, diagnostic.code, diagnostic.message)


@dataclass(slots=True)
class Sink:
    """Collects the findings of a stage, so that all of them are reported at once."""

    diagnostics: list[Diagnostic] = field(default_factory=list)

    def error(
        self,
        code: str,
        message: str,
        span: Span | None,
        help: str,
        related: Sequence[tuple[str, Span]] = (),
    ) -> None:
        found = Diagnostic(code, message, span, help, tuple(related))
        if found not in self.diagnostics:
            self.diagnostics.append(found)

    def raise_if_any(self) -> None:
        if self.diagnostics:
            raise SpecErrors(self.diagnostics)


def did_you_mean(name: str, known: Iterable[str], *, is_closed: bool = False) -> str:
    """The help line for an unknown name: the nearest known one, else all of them if they are few or cannot be added."""
    import difflib  # imported here, since only mistakes need it

    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    if not names:
        return "define it, or remove it: no such name is defined"
    if is_closed or len(names) <= MAX_NAMES:
        return f"known: {', '.join(names)}"
    return "define it: no known name is similar"


def no_line(file: str, line: int) -> None:
    """For `render` where no source is at hand."""


def render(diagnostic: Diagnostic, read_line: Callable[[str, int], str | None]) -> str:
    """The finding as text: `file:line:column: error[CODE]: sentence`, the line, the caret, the help.

    `read_line(file, line)` returns the source line, or None where it is not available.
    """
    parts = [_visible(str(diagnostic))]
    if diagnostic.span:
        parts += _excerpt(diagnostic.span, read_line)
    for label, span in diagnostic.related:
        parts.append(f"   note: {_visible(label)}: {span}")
        parts += _excerpt(span, read_line)
    parts += [f"   = help: {_visible(line)}" for line in diagnostic.help.splitlines()]
    return "\n".join(parts)


def _excerpt(span: Span, read_line: Callable[[str, int], str | None]) -> list[str]:
    line = read_line(span.file, span.line)
    if line is None:
        return []
    width = max(1, min(span.width, len(line) - span.column + 1))
    return [f"{span.line:>5} | {_visible(line)}", f"      | {' ' * (span.column - 1)}{'^' * width}"]


def _visible(text: str) -> str:
    """Text that is safe to print: control and bidirectional characters are replaced by `?`."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n" else c for c in text)
