"""The table of diagnostic codes: what the generator uses is explained, and what is explained is used."""

import re
from pathlib import Path

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.codes import CODES
from sageLLM.codegen.diagnostics import Sink, did_you_mean

CODEGEN = Path(driver.PACKAGE, "codegen")
CODE = re.compile(r"\bSAGE\d{3}\b")


def used_codes() -> set[str]:
    sources = [path for path in CODEGEN.rglob("*.py") if path.parent != CODEGEN / "codes"]
    return {code for path in sources for code in CODE.findall(path.read_text(encoding="utf-8"))}


def test_every_code_in_use_has_an_entry_and_every_entry_is_in_use() -> None:
    assert used_codes() == set(CODES)


BAD = Path(__file__).parent / "cases" / "bad"


def test_every_finding_names_a_remedy() -> None:
    """Each finding of the bad cases ends with at least one help line."""
    found = 0
    for path in sorted(BAD.glob("*/error.txt")):
        text = path.read_text(encoding="utf-8")
        findings = re.split(r"^(?=\S*error\[|\S+: error\[)", text, flags=re.M)[1:]
        assert findings, path
        for finding in findings:
            found += 1
            assert re.search(r"^   = help: \S", finding, re.M), f"{path}: {finding}"
    assert found > len(CODES)


def test_a_finding_without_a_remedy_is_refused() -> None:
    with pytest.raises(AssertionError, match="every finding has a remedy"):
        Sink().error("SAGE101", "a sentence", None, "")


def test_unknown_names_always_have_a_remedy() -> None:
    assert did_you_mean("hiden_size", ["hidden_size", "heads"]) == "did you mean 'hidden_size'?"
    assert did_you_mean("x", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", [f"name_{i:02}" for i in range(30)]) == "define it: no known name is similar"
    assert did_you_mean("x", [])


def test_no_code_is_given_twice() -> None:
    """A second entry of the same key would silently replace the first."""
    texts = [path.read_text(encoding="utf-8") for path in (CODEGEN / "codes").glob("*.py")]
    entries = [code for text in texts for code in re.findall(r'^    "(SAGE\d{3})": CodeInfo', text, re.M)]
    assert sorted(entries) == sorted(CODES)


def test_entries_say_something() -> None:
    for code, info in CODES.items():
        assert info.title and not info.title.endswith("."), code
        assert info.explanation.endswith("."), code


def test_every_finding_about_passes_has_a_case() -> None:
    cases = BAD.glob("*/error.txt")
    shown = {code for path in cases for code in re.findall(r"error\[(SAGE\d{3})\]", path.read_text(encoding="utf-8"))}
    assert {code for code in CODES if code.startswith("SAGE3")} <= shown
