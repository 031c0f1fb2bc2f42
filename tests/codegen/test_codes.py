"""The table of diagnostic codes: what the generator uses is explained, and what is explained is used."""

import re
from pathlib import Path

from sageLLM.codegen import driver
from sageLLM.codegen.codes import CODES

CODEGEN = Path(driver.PACKAGE, "codegen")
CODE = re.compile(r"\bSAGE\d{3}\b")


def used_codes() -> set[str]:
    sources = [path for path in CODEGEN.rglob("*.py") if path.name != "codes.py"]
    return {code for path in sources for code in CODE.findall(path.read_text(encoding="utf-8"))}


def test_every_code_in_use_has_an_entry_and_every_entry_is_in_use() -> None:
    assert used_codes() == set(CODES)


def test_no_code_is_given_twice() -> None:
    """A second entry of the same key would silently replace the first."""
    entries = re.findall(r'^    "(SAGE\d{3})": CodeInfo', (CODEGEN / "codes.py").read_text(encoding="utf-8"), re.M)
    assert entries == list(CODES)


def test_entries_say_something() -> None:
    for code, info in CODES.items():
        assert info.title and not info.title.endswith("."), code
        assert info.explanation.endswith("."), code


def test_every_finding_about_passes_has_a_case() -> None:
    cases = Path(__file__).parent.joinpath("cases", "bad").glob("*/error.txt")
    shown = {code for path in cases for code in re.findall(r"error\[(SAGE\d{3})\]", path.read_text(encoding="utf-8"))}
    assert {code for code in CODES if code.startswith("SAGE3")} <= shown
