"""Checks that the diagnostics quoted in docs/ are printed as quoted.

A quoted diagnostic names a spec file and shows its faulty line. The test writes that line into a copy of the file, a
spec of the package or of an example, and expects the same text from the generator. `SAGELLM_ACCEPT=1` rewrites quotes.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.commands import LineReader
from sageLLM.codegen.diagnostics import SpecErrors, render
from sageLLM.codegen.expectations import check_expectations
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.runtime.inspect.expectations import missed_expectations

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(
    r"^(?P<text>(?P<file>specs/[\w./]+):(?P<line>\d+):\d+: error\[.*\n *(?P=line) \| (?P<source>.*)\n[^`]*)^```$",
    re.MULTILINE,
)
ACCEPT = os.environ.get("SAGELLM_ACCEPT") == "1"
QUOTES = [
    pytest.param(page, found, id=f"{page.name}: {found['file']}:{found['line']}")
    for page in sorted(ROOT.glob("docs/*.md"))
    for found in QUOTED.finditer(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "quote"), QUOTES)
def test_a_quoted_error_is_printed(page: Path, quote: re.Match[str], tmp_path: Path, memo: LinkMemo) -> None:
    printed = errors_with(quote["file"], int(quote["line"]), quote["source"], tmp_path, memo)
    expected = quote["text"].rstrip("\n")
    if ACCEPT:
        [found] = [error for error in printed if error.startswith(f"{quote['file']}:{quote['line']}:")]
        page.write_text(page.read_text(encoding="utf-8").replace(expected, found), encoding="utf-8")
    else:
        assert expected in printed, "\n".join(printed)


def errors_with(file: str, line: int, source: str, tmp_path: Path, memo: LinkMemo) -> list[str]:
    """The diagnostics, as text, after the line of the spec file is replaced."""
    [original] = [path for path in (ROOT / file, *ROOT.glob(f"examples/*/{file}")) if path.exists()]
    folder = original.parents[1]
    copy = tmp_path / "specs"
    shutil.copytree(folder, copy)
    lines = original.read_text(encoding="utf-8").splitlines()
    lines[line - 1] = source
    (tmp_path / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    base, overlays = (copy, []) if folder == driver.BASE_SPECS else (driver.BASE_SPECS, [copy])
    with pytest.raises(SpecErrors) as caught:
        specs = driver.load_and_link(overlays, base, memo=memo)
        check_expectations(specs.raw, driver.emit(specs), missed_expectations)
    return [render(diagnostic, LineReader([copy])) for diagnostic in caught.value.diagnostics]


def test_the_docs_quote_errors() -> None:
    assert len(QUOTES) >= 8
