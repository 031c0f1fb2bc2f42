"""Checks of the READMEs and docs/models.md: Python runs, figures and counts are current, translations are in step."""

import os
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRANSLATED = ["README.md", "docs/tour.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def translation_of(page: str) -> str:
    return page.removesuffix(".md") + ".zh-CN.md"


def structure(text: str) -> list[str]:
    """One line for each thing that a translation keeps: headings, code, links, figures, list items, table rows."""
    kept = [f"code {language}: {body}" for language, body in BLOCK.findall(text)]
    for line in BLOCK.sub("", text).splitlines():
        if kind := re.match(r"#+ |\d+\. |- |\||<!-- .*|\*\*\d+\.", line):
            kept.append(kind[0].strip())
        targets = re.findall(r"\]\(([^)]+)\)", line) + re.findall(r'src(?:set)?="([^"]+)"', line)
        kept += [f"link {target.replace('.zh-CN.md', '.md')}" for target in targets]
        if line.startswith("|"):
            kept += sorted(f"inline {code}" for code in re.findall(r"`([^`]+)`", line))
            kept += sorted(f"figure {figure}" for figure in re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`.*?`", "", line)))
    return kept + sorted(f"inline {code}" for code in set(re.findall(r"`([^`]+)`", BLOCK.sub("", text))))


def differences(text: str, translation: str) -> list[tuple[str | None, str | None]]:
    pairs = zip_longest(structure(text), structure(translation))
    return [(here, there) for here, there in pairs if here != there]


@pytest.mark.parametrize("page", TRANSLATED)
def test_the_translation_is_in_step(page: str) -> None:
    assert differences(text_of(page), text_of(translation_of(page))) == []


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_page_and_its_translation_link_to_each_other(page: str) -> None:
    other = translation_of(page)
    assert f"]({Path(other).name})" in text_of(page)
    assert f"]({Path(page).name})" in text_of(other)


SAMPLE = "# A\n\nSee [b](b.md) and `make run`.\n\n| x | 3.5 ms |\n\n- one\n\n```\nmake run # 1\n```\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# A", "## A"),
        ("b.md", "c.md"),
        ("`make run`", "`make test`"),
        ("3.5", "3.6"),
        ("- one", "one"),
        ("# 1\n", "# 2\n"),
    ],
)
def test_a_translation_out_of_step_is_found(old: str, new: str) -> None:
    assert differences(SAMPLE, SAMPLE.replace("See", "见")) == []
    assert differences(SAMPLE, SAMPLE.replace(old, new)) != []


def test_python_blocks_run() -> None:
    blocks = [body for language, body in BLOCK.findall(text_of("README.md")) if language == "python"]
    assert blocks
    for body in blocks:
        run_python(body)


def run_python(code: str) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT / "_dev")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_measured_figures_are_those_of_the_results() -> None:
    """A row of the README's table starts like its line of docs/images/measured.py and has the same figures."""
    command = [sys.executable, ROOT / "docs" / "images" / "measured.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text_of("README.md").splitlines()]
    table = {name: figure for name, figure, _ in (row for row in rows if len(row) == 3)}
    dates = re.split(r" {2,}", printed.pop())[1]
    assert all(date in text_of(page) for page in ("README.md", "README.zh-CN.md") for date in dates.split(", ")), dates
    for name, figure in (re.split(r" {2,}", line) for line in printed):
        [row] = [row for row in table if row.startswith(name)]
        assert table[row].startswith(figure), f"{row!r}: expected {figure!r}, got {table[row]!r}"


@pytest.mark.parametrize(("page", "layouts"), [("README.md", "[{} layouts]"), ("README.zh-CN.md", "[{} 份布局]")])
def test_the_number_of_layouts(page: str, layouts: str) -> None:
    assert layouts.format(len([*ROOT.glob("specs/models/*.yaml")])) in text_of(page)


def test_the_models_page_counts_the_lines_of_every_layout() -> None:
    rows = re.findall(r"^\| (\w+) \| \w* ?\| (\d+) \| \d+ \|", text_of("docs/models.md"), re.MULTILINE)
    lines = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in ROOT.glob("specs/models/*.yaml")}
    counts = {name: sum(1 for line in text if line.strip() and line.lstrip()[0] != "#") for name, text in lines.items()}
    assert {name: int(count) for name, count in rows} == counts


def test_the_models_page_names_cases_of_the_oracle_tests() -> None:
    cases = re.findall(r"^\| \w+ \| (.+?) \| equal \|", text_of("docs/models.md"), re.MULTILINE)
    oracles = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/engine/test_oracle*.py"))
    assert cases
    assert [case for case in cases if f'"{case}"' not in oracles] == []
