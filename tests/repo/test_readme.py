"""Keeps the README true: what it names exists, what it shows runs, and the Chinese one says the same."""

import os
import re
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh-CN.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = ("benchmarks", "codegen", "docs", "examples", "generated", "runtime", "specs", "templates", "tests")


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def structure(text: str) -> list[str]:
    """One line for each thing that a translation keeps: headings, code, links, figures, list items, table rows."""
    kept = [f"code {language}: {body}" for language, body in BLOCK.findall(text)]
    for line in BLOCK.sub("", text).splitlines():
        if kind := re.match(r"#+ |\d+\. |- |\|", line):
            kept.append(kind[0].strip())
        kept += sorted(f"inline {code}" for code in re.findall(r"`([^`]+)`", line))
        kept += [f"link {target}" for target in re.findall(r"\]\(([^)]+)\)", line) if target not in READMES]
        if line.startswith("|"):
            kept += sorted(f"figure {figure}" for figure in re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`.*?`", "", line)))
    return kept


def differences(text: str, translation: str) -> list[tuple[str | None, str | None]]:
    pairs = zip_longest(structure(text), structure(translation))
    return [(here, there) for here, there in pairs if here != there]


def test_chinese_readme_is_in_step() -> None:
    assert differences(text_of("README.md"), text_of("README.zh-CN.md")) == []


@pytest.mark.parametrize("readme", READMES)
def test_each_readme_links_to_the_other(readme: str) -> None:
    [other] = set(READMES) - {readme}
    assert f"]({other})" in text_of(readme)


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


@pytest.mark.parametrize("readme", READMES)
def test_links_and_paths_exist(readme: str) -> None:
    text = text_of(readme)
    links = {target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target}
    paths = set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text))
    assert sorted(name for name in links | paths if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("readme", READMES)
def test_make_targets_exist(readme: str) -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|──)make ([a-z]+)", text_of(readme), re.MULTILINE))
    assert named and named <= targets


@pytest.mark.parametrize("readme", READMES)
def test_commands_exist(readme: str) -> None:
    named = set(re.findall(r"(?:^|`)sagellm ([a-z]+)", text_of(readme), re.MULTILINE))
    listed = run_python("import sys; from sageLLM.runtime.cli.main import main; sys.exit(main())", "--help")
    assert sorted(name for name in named if not re.search(rf"\b{name}\b", listed)) == []


def test_python_blocks_run() -> None:
    blocks = [body for language, body in BLOCK.findall(text_of("README.md")) if language == "python"]
    assert blocks
    for body in blocks:
        run_python(body)


def run_python(code: str, *arguments: str) -> str:
    environ = os.environ | {"PYTHONPATH": str(ROOT / "_dev")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
