"""Tests of the wording lint on samples; `make lint` runs it on the repository."""

from pathlib import Path

import pytest
import wording


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.py", '"""What the scheduler does."""', ["question clause"]),
        ("a.py", '"""Schedules steps."""\n\n\nclass A:\n    """A step whose batch is full."""', ["whose"]),
        ("a.py", 'raise ValueError(f"{name} wants {what}")', ["want"]),
        ("a.py", 'raise ValueError(f"{name} is " "no model of the registry")', ["is no"]),
        ("a.md", "# Title\n\n## Who goes first\n", ["question clause"]),
        ("a.h", "// What all kernels need.\n#pragma once\n// what, whose\n", ["question clause"]),
        ("a.cpp.jinja", "{#- view: RowView; the kernel whose rows are independent. -#}\n// anew\n", ["whose"]),
        ("a.yaml", "ops:\n  a:\n    summary: A norm with weights of its own.\n", ["of its own"]),
    ],
)
def test_rejected(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert [pattern for _, pattern in wording.hits_of(wording.strict_pieces(path))] == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", '"""Schedules steps."""\n\n\ndef f():\n    """Returns what is given."""\n    # whoever wants it\n'),
        ("a.py", 'f"expected {a}, got {b}"\nNAME = "who wants"'),
        ("a.md", "# Modes\n\n## Which mode is faster?\n"),
        ("a.py", '"""Runs a step that is no longer pending."""'),
        ("a.md", "# Scheduling order\n\nText that wants a rewrite.\n\n```\n# What now\n```\n"),
    ],
)
def test_accepted(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert list(wording.hits_of(wording.strict_pieces(path))) == []


def test_comment_density(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("# reason\nx = 1  # unit\n\ny = 2\nz = '#'\nw = 3\n", encoding="utf-8")
    assert wording.comment_density([tmp_path / "a.py"]) == 50.0
