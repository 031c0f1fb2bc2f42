"""Checks of the excerpts and transcripts in docs/ and the READMEs.

A fence after `<!-- from PATH, ... -->` shows lines of those files, and one after `<!-- output of: sagellm ... -->`
lines of that command's output. A fence that begins with `$ sagellm ...` is a transcript: its commands run one after
the other in an empty folder with a link to examples/, unless `<!-- not run -->` precedes it. A line `...` (or `# ...`,
`// ...`) marks lines left out; times may differ.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from pages import ROOT, Fence, each_page, fences_of
from typer.testing import CliRunner

from sageLLM.runtime.cli.main import app

MARKER = re.compile(r"<!-- (from|output of:|not run) ?(.*) -->")
ELISION = re.compile(r"\s*(?:#|//)?\s*\.\.\.\s*")


def missing_lines(excerpt: Sequence[str], source: Sequence[str]) -> list[str]:
    """The first stretch of the excerpt that is not in the source, in order and at any depth of indentation."""
    position, stretch = 0, list[str]()
    for line in [*excerpt, "..."]:
        if not ELISION.fullmatch(line):
            stretch.append(line)
        elif stretch:
            found = find(stretch, source, position)
            if found is None:
                return stretch
            position, stretch = found + len(stretch), []
    return []


def find(stretch: Sequence[str], source: Sequence[str], start: int) -> int | None:
    size, wanted = len(stretch), dedented(stretch)
    return next((i for i in range(start, len(source) - size + 1) if dedented(source[i : i + size]) == wanted), None)


def dedented(lines: Sequence[str]) -> list[str]:
    depth = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [re.sub(r"(?<=\S) +", " ", re.sub(r"\d+\.\d+\b", "0.0", line[depth:].rstrip())) for line in lines]


def lines_of(paths: str) -> list[str]:
    """The lines of files of the repository, or of folders that a transcript of the page has generated."""
    found = [path if (path := ROOT / name).exists() else Path(name) for name in paths.split(", ")]
    return [line for path in found for line in path.read_text(encoding="utf-8").splitlines()]


def output_of(command: str) -> list[str]:
    program, *arguments = shlex.split(re.sub(r" +[|#] .*", "", command))
    assert program == "sagellm", f"expected a sagellm command, got {command!r}"
    return CliRunner().invoke(app, arguments).output.splitlines()


def excerpts_of(fence: Fence) -> Iterator[tuple[str, Sequence[str], list[str]]]:
    """The name of each source that the fence quotes, the quoted lines, and the lines of the source."""
    marker = MARKER.fullmatch(fence.before.strip())
    match marker.groups() if marker else None:
        case ("from", paths):
            yield paths, fence.lines, lines_of(paths)
        case ("output of:", command):
            yield command, fence.lines, output_of(command)
        case None if fence.lines and fence.lines[0].startswith("$ sagellm "):
            starts = [i for i, line in enumerate(fence.lines) if line.startswith("$ ")]
            for start, end in pairwise([*starts, len(fence.lines)]):
                command = fence.lines[start].removeprefix("$ ")
                if command.startswith("sagellm ") and "CHECKPOINT" not in command:
                    yield command, fence.lines[start + 1 : end], output_of(command)


@each_page
def test_excerpts_are_lines_of_their_source(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    wrong = []
    for fence in fences_of(page.read_text(encoding="utf-8")):
        for name, lines, source in excerpts_of(fence):
            if missing := missing_lines(lines, source):
                wrong.append(f"{page.name}:{fence.line}: not in {name}:\n" + "\n".join(missing))
    assert not wrong, "\n\n".join(wrong)


@each_page
def test_excerpts_of_files_are_marked(page: Path) -> None:
    """A fence after a sentence that ends with the name of a file has the marker that lets its text be checked."""
    text = page.read_text(encoding="utf-8")
    unmarked = [
        f"{page.name}:{fence.line}: {found[1]}"
        for fence in fences_of(text)
        if (found := re.search(r"`([\w./-]+/[\w.-]+\.\w+)`[^`]*:$", fence.before))
        and ((ROOT / found[1]).exists() or found[1].startswith(("my_generated/", "my_models/", "my_passes/")))
    ]
    assert not unmarked, "write <!-- from PATH --> before these fences:\n" + "\n".join(unmarked)


SOURCE = ["def f():", "    a = 1", "    b = 2", "", "    return a"]


@pytest.mark.parametrize(
    ("excerpt", "missing"),
    [
        (["a = 1", "b = 2"], []),
        (["def f():", "    # ...", "    return a"], []),
        (["def f():", "...", "    a = 1"], []),
        (["a = 1", "return a"], ["a = 1", "return a"]),
        (["return a", "...", "a = 1"], ["a = 1"]),
        (["    a = 1", "  b = 2"], ["    a = 1", "  b = 2"]),
        (["b = 3"], ["b = 3"]),
    ],
)
def test_what_an_excerpt_may_leave_out(excerpt: list[str], missing: list[str]) -> None:
    assert missing_lines(excerpt, SOURCE) == missing
