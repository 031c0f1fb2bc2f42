"""The pages of the documentation, their fenced blocks and their prose."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/*.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block: its first line's number, the line before it, and its lines."""

    line: int
    before: str
    lines: tuple[str, ...]


def fences_of(text: str) -> Iterator[Fence]:
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    for start, end in zip(starts[::2], starts[1::2], strict=True):
        before = next((line for line in reversed(lines[:start]) if line.strip()), "")
        yield Fence(start + 2, before, tuple(lines[start + 1 : end]))


def prose_of(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
