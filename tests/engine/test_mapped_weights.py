"""Packed weights in a file that is mapped: equal answers, files that are damaged, stale or too many, shared pages."""

import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.errors import CheckpointError, SageError
from sageLLM.runtime.executor import kernel_choice
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.packing import PackedWeight
from sageLLM.runtime.loader import mapped_weights
from sageLLM.runtime.loader.mapped_weights import prune
from tests.formats import packers

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
MakeCheckpoint = Callable[..., Path]
PROMPTS = [[5, 80, 13, 2, 150], [7] * 12]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 64}
Answers = list[tuple[int, ...]]


def answers(model: Path, **options: Any) -> Answers:
    llm = LLM(model, num_kv_blocks=64, skip_tokenizer=True, **options)
    try:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    finally:
        llm.close()


def mapped(folder: Path, model: Path = MODEL, **options: Any) -> Answers:
    return answers(model, weights_tier="mapped", weights_folder=folder, **options)


@pytest.fixture
def only_mapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forbids that weights are read from the checkpoint from now on."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the weights are in the file")

    return lambda: monkeypatch.setattr(mapped_weights, "read_weights", fail)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_later_starts_read_the_file_alone(
    dtype: str, kernels: str, tmp_path: Path, only_mapped: Callable[[], None]
) -> None:
    options = {"dtype": dtype, "kernels": kernels}
    expected = answers(MODEL, **options)
    assert mapped(tmp_path, **options) == expected
    only_mapped()
    assert mapped(tmp_path, **options) == expected
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("kind", "activation_dtype"),
    [("packed, 8 bits", "auto"), ("packed, 8 bits", "int8"), ("nvfp4", "int8"), ("nvfp4", "auto"), ("fp8", "auto")],
)
def test_weights_of_codes(
    kind: str, activation_dtype: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, only_mapped: Callable[[], None]
) -> None:
    """With their forms, the types of their activations, and the reasons for those that are dequantised."""
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path / "model", kind)
    options: dict[str, Any] = {"dtype": "bfloat16", "activation_dtype": activation_dtype}
    expected = answers(folder, **options)
    stats = LLM(folder, skip_tokenizer=True, **options).weight_stats()
    assert mapped(tmp_path / "files", folder, **options) == expected
    only_mapped()
    llm = LLM(folder, skip_tokenizer=True, weights_tier="mapped", weights_folder=tmp_path / "files", **options)
    assert llm.weight_stats() == stats
    assert mapped(tmp_path / "files", folder, **options) == expected


def test_pages_are_not_copied(tmp_path: Path) -> None:
    """Processes that map a file share its pages: no page of it is the process's own."""
    mapped(tmp_path)
    llm = LLM(MODEL, skip_tokenizer=True, weights_tier="mapped", weights_folder=tmp_path)
    llm.generate(PROMPTS, GREEDY)
    (path,) = tmp_path.iterdir()
    areas = Path("/proc/self/smaps").read_text(encoding="utf-8").split(str(path))[1:]
    sizes = [re.search(r"Rss: +(\d+) kB(?:.|\n)*?Private_Dirty: +(\d+) kB", area) for area in areas]
    assert sum(int(found[1]) for found in sizes if found) > 0
    assert sum(int(found[2]) for found in sizes if found) == 0
    assert llm.model.weights["lm_head"] is llm.model.weights["embed"] or "lm_head" not in llm.model.ties


def test_damaged_files_are_written_again(tmp_path: Path) -> None:
    expected = mapped(tmp_path)
    (path,) = tmp_path.iterdir()
    intact = path.read_bytes()
    one_bit = intact[:5000] + bytes([intact[5000] ^ 1]) + intact[5001:]
    for damaged in (one_bit, intact[:-100], b"", intact[:-8] + b"12345678"):
        path.write_bytes(damaged)
        assert mapped(tmp_path) == expected
        assert path.read_bytes() == intact


def test_files_of_other_facts_are_not_used(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was written again, another element type, kernels, and code of another version."""
    model, files = make_checkpoint("Llama", **SMALL), tmp_path / "files"
    mapped(files, model, dtype="float32")
    mapped(files, model, dtype="bfloat16")
    mapped(files, model, dtype="float32", kernels="reference")
    assert len(list(files.iterdir())) == 3 - (find_compiler() is None)
    count = len(list(files.iterdir()))
    weights = next(model.glob("*.safetensors"))
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    mapped(files, model, dtype="float32")
    assert len(list(files.iterdir())) == count + 1
    monkeypatch.setattr(mapped_weights, "_code_digest", lambda packages: "another version")
    mapped(files, model, dtype="float32")
    assert len(list(files.iterdir())) == count + 2


def test_without_a_compiler_no_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would have floats for the next start, when there may be one. A file that exists is used."""
    expected = answers(MODEL, dtype="float32")
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_choice, "find_compiler", lambda: None)
    with caplog.at_level(logging.WARNING, logger="sagellm"):
        assert mapped(tmp_path / "files", dtype="float32") == expected
    assert "no C++ compiler found" in caplog.text and not (tmp_path / "files").exists()


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
def test_packed_files_are_unpacked_for_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mapped(tmp_path, dtype="float32")
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_choice, "find_compiler", lambda: None)
    assert mapped(tmp_path, dtype="float32") == expected


def test_ranks_and_roles_have_the_files_of_their_shares(tmp_path: Path) -> None:
    """Prefill and decode workers read the same file."""
    expected = answers(MODEL, dtype="float32")
    assert mapped(tmp_path, dtype="float32", tensor_parallel_size=2) == expected
    assert len(list(tmp_path.iterdir())) == 2
    workers = {"scheduler": PDSchedulerConfig(mode="strict"), "prefill_workers": 1, "decode_workers": 1}
    assert mapped(tmp_path, dtype="float32", **workers) == expected
    assert mapped(tmp_path, dtype="float32") == expected
    assert len(list(tmp_path.iterdir())) == 3


def test_the_files_that_were_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for age, name in enumerate(["new", "kept", "middle", "old", "draft-alive"]):
        path = tmp_path / f"{name}.weights"
        path.write_bytes(bytes(2**20))
        os.utime(path, (now - 60 * age, now - 60 * age))
    killed, other = tmp_path / "draft-killed.weights", tmp_path / "other.txt"
    killed.write_bytes(bytes(2**20))
    os.utime(killed, (now - 10**6, now - 10**6))
    other.write_bytes(bytes(2**20))
    monkeypatch.setenv("SAGELLM_WEIGHTS_LIMIT", str(4 / 1024))
    prune(tmp_path, tmp_path / "kept.weights")
    names = {path.name.removesuffix(".weights") for path in tmp_path.iterdir()}
    assert names == {"new", "kept", "middle", "draft-alive", "other.txt"}
    monkeypatch.setenv("SAGELLM_WEIGHTS_LIMIT", "0")
    prune(tmp_path, tmp_path / "kept.weights")
    assert {path.name for path in tmp_path.iterdir()} == {"kept.weights", "draft-alive.weights", "other.txt"}


@pytest.mark.parametrize("limit", ["-1", "nan", "many"])
def test_a_limit_is_a_number(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_WEIGHTS_LIMIT", limit)
    with pytest.raises(SageError, match=f"SAGELLM_WEIGHTS_LIMIT must be a number of GiB of at least 0, got '{limit}'"):
        mapped(tmp_path)
    assert not list(tmp_path.iterdir())


def test_use_is_recorded(tmp_path: Path) -> None:
    mapped(tmp_path)
    (path,) = tmp_path.iterdir()
    os.utime(path, (1, 1))
    mapped(tmp_path)
    assert path.stat().st_mtime > 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="pass a weights_folder with enough room"):
        mapped(tmp_path / "file" / "folder")


def test_other_forms_of_weights_are_refused() -> None:
    """Those that a tensor stands for: a file would have other values than the kernels read."""

    class Coded(Tensor):
        pass

    with pytest.raises(SageError, match="weights_tier 'mapped' requires kernels 'auto' or 'cpu' for weights of codes"):
        mapped_weights._piece(["w"], torch.zeros(2, 2).as_subclass(Coded))
    assert mapped_weights._piece(["w"], PackedWeight(torch.zeros(512), torch.Size((16, 32)), 1)).gates == 1
