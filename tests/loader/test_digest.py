"""Digests of checkpoints: equal for copies, and others for other weights or another config."""

import json
import re
import shutil
from pathlib import Path

import pytest

from sageLLM import LLM
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.checkpoint_index import INDEX_FILE
from sageLLM.runtime.loader.digest import checkpoint_digest, weight_files, weights_digest
from sageLLM.runtime.worker.fingerprint import difference, fingerprint

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
    weights.write_bytes(content)
    (copy / "consolidated.safetensors").write_bytes(b"not read")
    assert checkpoint_digest(copy) == digest


def test_the_shards_of_an_index(tmp_path: Path) -> None:
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    for name in {*names.values()}:
        (tmp_path / name).write_bytes(name.encode())
    assert [one.name for one in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    before = weights_digest(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"model-3.safetensors")
    assert weights_digest(tmp_path) != before


def test_small_files_and_absent_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert checkpoint_digest(path) == checkpoint_digest(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        checkpoint_digest(tmp_path / "absent.gguf")


def test_ranks_with_other_weights_differ(tmp_path: Path) -> None:
    """Of the same config, such as those before and after a fine-tuning."""
    llm = LLM(MODEL, skip_tokenizer=True)
    folder = tmp_path / "copy"
    shutil.copytree(MODEL, folder)
    facts = [fingerprint(MODEL, llm.model, llm.compiler), fingerprint(folder, llm.model, llm.compiler)]
    assert difference(*facts) is None
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-100_000:] = bytes(100_000)
    (folder / "model.safetensors").write_bytes(weights)
    found = difference(facts[0], fingerprint(folder, llm.model, llm.compiler))
    assert found is not None and re.fullmatch(r"weights: \w{16} and \w{16}", found)
