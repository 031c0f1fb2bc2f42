"""Weights of bitsandbytes: bit-equal to the library, as recorded; states and tensors that do not fit are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.kernels.cpu.coded import CodedWeight, decoded
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.loader.safetensors_reader import Checkpoint
from sageLLM.runtime.registry.plugins import load_registry
from tests.formats.packers import NF4

RECORDED = load_file(Path(__file__).parent / "recorded_bitsandbytes.safetensors")
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4_nested": {**NF4, "bnb_4bit_use_double_quant": True},
    "fp4": {**NF4, "bnb_4bit_quant_type": "fp4"},
    "fp4_nested": {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "llm_int8": {**NF4, "load_in_4bit": False, "load_in_8bit": True},
}
STATE = "layer.weight.quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


def recorded(name: str) -> Tensors:
    """The tensors of a weight, under the names of a checkpoint, and its value."""
    return {f"layer.{key.partition('.')[2]}": one for key, one in RECORDED.items() if key.split(".")[0] == name}


def opened(folder: Path, name: str, tensors: Tensors, **settings: Any) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"quantization_config": {**SETTINGS[name], **settings}}))
    save_file({key: one.contiguous() for key, one in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder, load_registry())


@pytest.mark.parametrize("name", SETTINGS)
def test_values_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    tensors = recorded(name)
    value = tensors.pop("layer.value")
    checkpoint = opened(tmp_path, name, tensors)
    assert list(checkpoint.names) == ["layer.weight"]
    assert torch.equal(checkpoint.read("layer.weight"), value)
    assert torch.equal(checkpoint.read("layer.weight", slice(1, 3)), value[1:3])


def test_integers_stay_codes(tmp_path: Path) -> None:
    """Their scales are multiplied with 1 / 127, which rounds them once."""
    tensors = recorded("llm_int8")
    value = tensors.pop("layer.value")
    found = opened(tmp_path, "llm_int8", tensors).read_codes("layer.weight", torch.bfloat16)
    assert isinstance(found, CodedWeight) and found.form == "int8" and found.group == value.shape[1]
    torch.testing.assert_close(decoded(found), value, rtol=2.0**-22, atol=0)


def with_state(tensors: Tensors, **changes: Any) -> Tensors:
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    text = json.dumps({key: one for key, one in state.items() if one is not None})
    return tensors | {STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: one for key, one in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, STATE), f"missing tensor '{STATE}' or '{STATE[:-3]}fp4' of the format four_bits"),
        (lambda t: t | {STATE: t[STATE][:9]}, f"tensor '{STATE}' must be the bytes of a JSON object: "),
        (lambda t: t | {STATE: t[STATE].float()}, f"tensor '{STATE}' must be the bytes of a JSON object, up to 65536"),
        (lambda t: with_state(t, shape=[24]), f"tensor '{STATE}': 'shape.1' must be a number above 0, got None"),
        (lambda t: with_state(t, blocksize=-64), f"tensor '{STATE}': 'blocksize' must be a number above 0, got -64"),
        (lambda t: with_state(t, blocksize=128), f"tensor '{STATE}': rows of 832 inputs are not whole blocks of 128"),
        (lambda t: with_state(t, shape=[48, 832]), "tensor 'layer.weight': expected 19968 elements for u8[N, K/2]"),
        (lambda t: with_state(t, nested_offset="0"), f"tensor '{STATE}': 'nested_offset' must be a number, got '0'"),
        (lambda t: with_state(t, nested_blocksize=None), f"tensor '{STATE}': 'nested_blocksize' must be a number"),
        (lambda t: with_state(t, nested_blocksize=259), "'nested_blocksize' must be a power of two, got 259"),
        (lambda t: with_state(t, nested_blocksize=64), "tensor 'layer.weight.nested_absmax': expected 5 numbers in"),
        (
            lambda t: without(t, "layer.weight.nested_quant_map"),
            "missing tensor 'layer.weight.nested_quant_map' of the format four_bits, as its 'absmax' has bytes",
        ),
        (lambda t: without(t, "layer.weight.quant_map"), "missing tensor 'layer.weight.quant_map' of the format four"),
        (lambda t: t | {"layer.weight": t["layer.weight"][:-1]}, "expected 9984 elements for u8[N, K/2], by its state"),
    ],
)
def test_states_that_do_not_fit(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    tensors = without(recorded("nf4_nested"), "layer.value")
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, "nf4_nested", change(tensors))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path} does not match its format 'bitsandbytes':") and message in text, text
    assert text.count("\n") in (0, 2)  # a wrong shape is that of two tensors


def test_other_storage_is_refused(tmp_path: Path) -> None:
    tensors = without(recorded("nf4"), "layer.value")
    with pytest.raises(CheckpointError, match="'bnb_4bit_quant_storage' must be absent or uint8, got 'bfloat16'"):
        opened(tmp_path, "nf4", tensors, bnb_4bit_quant_storage="bfloat16")


@pytest.mark.parametrize("name", ["nf4", "llm_int8"])
def test_both_modes_are_refused(name: str, tmp_path: Path) -> None:
    tensors = without(recorded(name), "layer.value")
    with pytest.raises(CheckpointError, match=r"'load_in_[48]bit' must be .*, got true"):
        opened(tmp_path, name, tensors, load_in_4bit=True, load_in_8bit=True)
