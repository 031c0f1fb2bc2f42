"""Tests of `sagellm cache`."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sageLLM.runtime.cli.main import app

FILES = {
    "kernels/linear-bf16-1-2-f-3.so": 3 * 2**20,
    "kernels/build-x/library.so": 5,  # of a compiler that runs
    "weights/a.weights": 2**20,
    "weights/draft-b.weights": 2**20,
    "weights/notes.txt": 7,
    "gguf/model-1/config.json": 100,
    "gguf/model-1/tokenizer.json": 150,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "cache"))
    for name, size in FILES.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    (tmp_path / "model.gguf").write_bytes(bytes(2**20))
    (tmp_path / "cache" / "gguf" / "model-1" / "model.gguf").symlink_to(tmp_path / "model.gguf")
    return tmp_path / "cache"


def sagellm(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cache", *arguments])


def test_sizes_of_the_parts(folder: Path) -> None:
    """A link to a GGUF file does not count with the file."""
    assert sagellm().stdout.splitlines() == [
        str(folder),
        "kernels       1 entries        3.0 MiB",
        "weights       2 entries        2.0 MiB",
        "gguf          1 entries        0.0 MiB",
    ]
    report = json.loads(sagellm("--json").stdout)
    assert report["folder"] == str(folder)
    assert [part["bytes"] for part in report["parts"][:2]] == [3 * 2**20, 2**21]
    assert 250 <= report["parts"][2]["bytes"] < 1000


def test_parts_are_cleared(folder: Path) -> None:
    """Only what the cache has made: other files, and the GGUF files that links name, stay."""
    assert "weights       0 entries" in sagellm("--clear", "weights").stdout
    assert (folder / "kernels/linear-bf16-1-2-f-3.so").exists() and (folder / "gguf/model-1").exists()
    done = sagellm("--clear", "all")
    assert done.exit_code == 0 and "0.0 MiB" in done.stdout
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == ["kernels/build-x/library.so", "weights/notes.txt"]
    assert (folder.parent / "model.gguf").exists()


def test_an_empty_cache_and_one_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "none"))
    assert sagellm("--clear", "kernels").exit_code == 0
    assert sagellm("--clear", "none").exit_code == 2
    monkeypatch.delenv("SAGELLM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    done = sagellm()
    assert done.exit_code == 1
    assert done.stderr.startswith(
        "error: cannot read or clear the cache: the home folder is unknown; set SAGELLM_CACHE"
    )
