"""Digests of checkpoints: equal for copies, and others for other weights or another config."""

import shutil
from pathlib import Path

import pytest

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.digest import checkpoint_digest

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"


def test_copies_have_equal_digests_and_others_differ(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(MODEL, copy)
    digest = checkpoint_digest(MODEL)
    assert checkpoint_digest(copy) == digest
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace("{", "{ ", 1))
    assert checkpoint_digest(copy) != digest
    (copy / "config.json").write_text(config)
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content + b"\0"):
        weights.write_bytes(changed)
        assert checkpoint_digest(copy) != digest
    assert checkpoint_digest(weights) != checkpoint_digest(MODEL / "model.safetensors")


def test_small_files_and_absent_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert checkpoint_digest(path) == checkpoint_digest(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint_digest(tmp_path / "absent.gguf")
