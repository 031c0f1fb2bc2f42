"""Checkpoints: what is listed and read, and the exact message for each bad folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sageLLM.runtime.core.printable import quoted
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.safetensors_reader import Checkpoint

TENSORS = {
    "embed": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "half": torch.ones(3, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 5),
}


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    names = list(TENSORS)
    for i, part in enumerate((names[:2], names[2:])):
        save_file({name: TENSORS[name] for name in part}, tmp_path / f"model-{i}.safetensors")
    weight_map = {name: f"model-{i // 2}.safetensors" for i, name in enumerate(names)}
    write_index(tmp_path, {"metadata": {}, "weight_map": weight_map})
    return tmp_path


def write_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def point_to(folder, file_name, tensor="embed"):
    write_index(folder, {"weight_map": {tensor: file_name}})


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return str(caught.value).replace(str(folder), "F")


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_headers_and_tensors(kind, request):
    checkpoint = Checkpoint.open(request.getfixturevalue(kind))
    assert set(checkpoint) == set(TENSORS)
    assert len(checkpoint) == 4
    assert "embed" in checkpoint
    for name, tensor in TENSORS.items():
        info = checkpoint.info(name)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.num_bytes == tensor.numel() * tensor.element_size()
        assert torch.equal(checkpoint.read(name), tensor)


def test_rows_are_read_on_their_own(single):
    checkpoint = Checkpoint.open(single)
    assert torch.equal(checkpoint.read("embed", slice(2, 4)), TENSORS["embed"][2:4])
    assert torch.equal(checkpoint.read("embed", slice(4, None)), TENSORS["embed"][4:])
    assert torch.equal(checkpoint.read("embed", slice(None, 99)), TENSORS["embed"])
    assert torch.equal(checkpoint.read("scalar", slice(0, 1)), TENSORS["scalar"])


def test_opening_reads_no_data(single, monkeypatch):
    monkeypatch.setattr("sageLLM.runtime.loader.safetensors_reader.safe_open", None)
    assert Checkpoint.open(single).info("embed").shape == (6, 4)


def test_a_closed_checkpoint_opens_again(single):
    checkpoint = Checkpoint.open(single)
    checkpoint.read("embed")
    checkpoint.close()
    assert torch.equal(checkpoint.read("embed"), TENSORS["embed"])


def test_unknown_tensor(single):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(single).info("nope")
    assert str(caught.value) == f"expected the tensor 'nope' in {single}"


def test_missing_and_empty_folder(tmp_path):
    assert refusal(tmp_path) == "F has neither model.safetensors nor model.safetensors.index.json"
    assert refusal(tmp_path / "no") == "F is not a folder; pass the folder of a Hugging Face checkpoint"
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    assert refusal(tmp_path) == (
        "F has neither model.safetensors nor model.safetensors.index.json; found other.safetensors"
    )


def test_pickle_checkpoint_is_refused_unread(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert refusal(tmp_path) == (
        "F has only pickled weights (pytorch_model.bin), which can run code when loaded; convert them once with "
        "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
    )


def test_bad_indexes(sharded):
    index = "F/model.safetensors.index.json"
    (sharded / "model-1.safetensors").unlink()
    missing = f"{index} lists the file 'model-1.safetensors', which is missing; download it again"
    assert refusal(sharded) == missing
    point_to(sharded, "model-0.safetensors", "ghost")
    assert refusal(sharded) == f"{index} lists the tensor 'ghost' in model-0.safetensors, which does not contain it"
    point_to(sharded, "pytorch_model.bin")
    assert refusal(sharded) == f"{index}: shards must be .safetensors files, got the file 'pytorch_model.bin'"
    point_to(sharded, 3)
    assert refusal(sharded) == f"{index}: the file of the tensor 'embed' must be a string, got 3"
    write_index(sharded, {"weights": {}})
    assert refusal(sharded) == f"{index} must have a 'weight_map' from tensor names to file names; download it again"
    (sharded / "model.safetensors.index.json").write_text("{")
    assert refusal(sharded).startswith(f"{index} is damaged: its JSON cannot be read (Expecting")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "", "a\0b"])
def test_index_that_leaves_the_folder(sharded, name):
    point_to(sharded, name)
    assert refusal(sharded) == (
        f"F/model.safetensors.index.json: shards must be in the folder of the index, got the file {quoted(name)}"
    )


def test_index_with_file_names_that_no_file_system_allows(sharded):
    index = "F/model.safetensors.index.json"
    for stem in ("x" * 1_000_000, "\u00e9" * 200, "\x1b[31m", "\ud800"):
        name = stem + ".safetensors"
        point_to(sharded, name)
        shown = quoted(name)
        assert len(shown) < 300
        assert refusal(sharded) == f"{index} lists the file {shown}, which is missing; download it again"


def write_raw(folder, header, data=b"", header_len=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(encoded) if header_len is None else header_len
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + encoded + data)


def test_truncated_file(single):
    path = single / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    assert refusal(single) == (
        f"F/model.safetensors is damaged: it is cut off after {len(data) - 10} of {len(data)} bytes; download it again"
    )
    path.write_bytes(data[:30])
    assert refusal(single) == (
        "F/model.safetensors is damaged: its 30 bytes do not contain a header; download it again"
    )
    path.write_bytes(b"")
    assert refusal(single) == "F/model.safetensors is damaged: its 0 bytes do not contain a header; download it again"


def entry(**changes):
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


BAD_HEADERS = [
    (entry(shape=[3]), "is damaged: expected 12 bytes for 'x', got 8; download it again"),
    (entry(shape=[-2]), "is damaged: the shape of 'x' must be a list of sizes, got a list; download it again"),
    (entry(shape=[2.0]), "is damaged: the shape of 'x' must be a list of sizes, got a list; download it again"),
    (entry(data_offsets=[0]), "is damaged: the data_offsets of 'x' must be two offsets, got a list; download it again"),
    ({"x": 3}, "is damaged: the header entry of 'x' must be an object, got 3; download it again"),
    ([], "is damaged: expected a JSON object, got a list; download it again"),
]


@pytest.mark.parametrize(("header", "message"), BAD_HEADERS)
def test_bad_headers(tmp_path, header, message):
    write_raw(tmp_path, header, b"\0" * 8)
    assert refusal(tmp_path) == f"F/model.safetensors {message}"


@pytest.mark.parametrize("num_dims", [17, 500, 100_000])
def test_too_many_dims(num_dims, tmp_path):
    write_raw(tmp_path, entry(shape=[1] * num_dims, data_offsets=[0, 4]), b"\0" * 8)
    assert refusal(tmp_path) == f"F/model.safetensors: the tensor 'x' must have at most 16 dims, got {num_dims}"


def test_sizes_beyond_64_bits(tmp_path):
    write_raw(tmp_path, entry(shape=[0, 2**63], data_offsets=[0, 0]))
    assert refusal(tmp_path).startswith("F/model.safetensors is damaged: the shape of 'x' must be a list of sizes")


def test_headers_beyond_the_bounds(tmp_path):
    write_raw(tmp_path, {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(2**18 + 1)})
    assert refusal(tmp_path) == (
        "F/model.safetensors must have at most 262144 tensors, got 262145; split the checkpoint into shards"
    )
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((60_000_000).to_bytes(8, "little"))
        file.truncate(60_000_008)
    assert refusal(tmp_path) == (
        "F/model.safetensors: the header must have at most 50331648 bytes, got 60000000; "
        "split the checkpoint into shards"
    )


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E5M2FNUZ", "C64", "f32"])
def test_unknown_dtype(dtype, tmp_path):
    write_raw(tmp_path, entry(dtype=dtype), b"\0" * 8)
    assert refusal(tmp_path) == (
        f"F/model.safetensors: the tensor 'x' has the element type '{dtype}', which is not supported; "
        "use a checkpoint with float32, bfloat16 or float16 weights"
    )


def test_dtype_that_is_not_text(tmp_path):
    write_raw(tmp_path, entry(dtype=4), b"\0" * 8)
    assert "is damaged: the dtype of 'x' must be text, got 4" in refusal(tmp_path)


def test_nested_header_and_huge_length(tmp_path):
    write_raw(tmp_path, b"[" * 100_000)
    assert refusal(tmp_path).startswith("F/model.safetensors is damaged: its JSON cannot be read (maximum recursion")
    write_raw(tmp_path, {}, header_len=2**63)
    assert (
        refusal(tmp_path) == "F/model.safetensors is damaged: its 10 bytes do not contain a header; download it again"
    )


def test_a_file_that_is_damaged_behind_our_back(tmp_path):
    """Overlapping tensors pass our header check and are refused by the library when they are read."""
    header = entry() | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}
    write_raw(tmp_path, header, b"\0" * 12)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path).read("x")
    assert str(caught.value).startswith(f"{tmp_path}/model.safetensors cannot be read: ")
