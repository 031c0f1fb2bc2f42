"""A formatter that is missing or broken is a finding with a remedy, and nothing is written."""

from pathlib import Path
from typing import Any

import pytest

from sageLLM.codegen import render
from sageLLM.codegen.diagnostics import SpecErrors
from sageLLM.codegen.render import Output, format_sources

PYTHON, CPP = Output("ops/x.py", "x = 1\n"), Output("kernels/cpu/x.cpp", "int x;\n")


def finding(outputs: list[Output]) -> str:
    with pytest.raises(SpecErrors) as caught:
        format_sources(outputs)
    [found] = caught.value.diagnostics
    assert found.code == "SAGE507" and found.help is not None and "reinstall" in found.help
    return found.message


def test_ruff_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(render, "_tool", lambda name: tmp_path / name)
    assert finding([PYTHON]).startswith("the formatter ruff must be runnable: ")


def test_ruff_is_not_executable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ruff").write_text("not a program")
    monkeypatch.setattr(render, "_tool", lambda name: tmp_path / name)
    assert "ruff" in finding([PYTHON, CPP])


def test_clang_format_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    for found in (None, Spec()):
        answer: Any = lambda name, found=found: found  # noqa: E731
        monkeypatch.setattr(render, "find_spec", answer)
        assert finding([CPP]).startswith("the formatter clang-format must be runnable: ")
