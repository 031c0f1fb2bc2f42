"""Tests of the requirements of `make test-lowest`."""

import tomllib
from pathlib import Path

import lowest
import pytest

ROOT = Path(__file__).parents[2]


def test_every_dependency_has_a_lowest_version() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = lowest.lowest_versions(dependencies)
    pinned = lowest.pinned_versions((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(found) == len(dependencies) - 1 and len(pinned) == len(lowest.PINNED)


def test_a_dependency_without_a_version() -> None:
    assert lowest.lowest_versions(["a>=1.2", "b==3", "torch>=2"]) == ["a==1.2", "b==3"]
    with pytest.raises(ValueError, match="must be NAME>=VERSION or NAME==VERSION, got 'a'"):
        lowest.lowest_versions(["a"])
