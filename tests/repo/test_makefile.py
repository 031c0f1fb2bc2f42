"""Checks of the Makefile: files that test-fast skips exist, and every target of the command line has a help text."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")


def test_the_slow_files_exist() -> None:
    """A moved file would otherwise slow test-fast down unnoticed."""
    [names] = re.findall(r"^SLOW := (.*)$", TEXT, re.MULTILINE)
    assert [name for name in names.split() if not (ROOT / name).exists()] == []


def test_every_target_has_a_help_text() -> None:
    """Those without one would also be missing from `.PHONY`, which is derived from the help texts."""
    targets = re.findall(r"^([a-z-]+):(?!=).*$", TEXT, re.MULTILINE)
    described = re.findall(r"^([a-z-]+):.*## \S", TEXT, re.MULTILINE)
    assert targets == described
