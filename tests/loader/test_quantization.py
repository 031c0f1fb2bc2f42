"""Quantised checkpoints without support are refused in one line with the format, by `LLM` and `sagellm lint model`."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sageLLM import LLM
from sageLLM.generated.formats import METHODS
from sageLLM.runtime.cli.lint import LintRequest, lint_checkpoint
from sageLLM.runtime.errors import CheckpointError

MakeCheckpoint = Callable[..., Path]
ONE_LAYER = {"num_hidden_layers": 1, "max_position_embeddings": 64}
METHODS_OF_CONFIGS = sorted(one.quant_method for one in METHODS.values() if one.quant_method is not None)
REMEDY = (
    f", which is not supported; use a checkpoint in one of {', '.join(METHODS_OF_CONFIGS)}, or with float32, bfloat16 "
    "or float16 weights"
)
NO_SETTINGS = ", and config.json must have its settings in 'quantization_config'; download it again"


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a valid checkpoint, to be quantised."""
    return Path(shutil.copytree(make_checkpoint("Llama", **ONE_LAYER), tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantise(folder: Path, linear: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]) -> None:
    """Replaces the weight of each linear layer by the tensors that `linear` makes of its stem and its values."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        is_linear = name.endswith("proj.weight")
        tensors |= linear(name.removesuffix("weight"), tensor) if is_linear else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check_refused(folder: Path, format: str, capsys: pytest.CaptureFixture[str], remedy: str = REMEDY) -> None:
    """Both commands print one line with the format, and neither a list of tensors."""
    reason = f"the checkpoint is quantised ({format}){remedy}"
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, skip_tokenizer=True)
    assert str(caught.value) == f"{folder}: {reason}"
    assert lint_checkpoint(LintRequest("model", folder, None, None, (), False)) == 100
    lines = capsys.readouterr().out.splitlines()
    assert f"  quantised     {reason}" in lines
    assert not any(line.startswith(("  bytes", "    ")) for line in lines)


@pytest.mark.parametrize(
    ("section", "format"),
    [
        ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "aqlm"),
        ({"quant_method": "hqq", "bits": 4}, "hqq, 4 bits"),
        ({"quant_method": "eetq"}, "eetq"),
        ({"quant_method": "\x1b[31mred"}, "[31mred"),
        ({"bits": 3}, "unknown, 3 bits"),
        ({}, "unknown"),
        ("int4", "'int4'"),
    ],
)
def test_a_quantization_config(section: object, format: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, quantization_config=section)
    check_refused(folder, f"{format}: 'quantization_config' in config.json", capsys)


def test_other_keys_of_the_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder, text_config={"quantization_config": {"quant_method": "hqq"}})
    check_refused(folder, "hqq: 'text_config.quantization_config' in config.json", capsys)
    edit_config(folder, text_config=None, quantization={"group_size": 64, "bits": 4})
    check_refused(folder, "mlx, 4 bits: 'quantization' in config.json", capsys)
    edit_config(folder, quantization=None, quantization_config=None)
    LLM(folder, skip_tokenizer=True)


@pytest.mark.parametrize(
    ("name", "settings", "format"),
    [
        ("quantize_config.json", {"bits": 4, "quant_method": "marlin"}, "marlin, 4 bits"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "modelopt, NVFP4"),
    ],
)
def test_a_settings_file(
    name: str, settings: object, format: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(json.dumps(settings))
    check_refused(folder, f"{format}: {name}", capsys)


def test_a_quantised_kv_cache_alone_is_accepted(folder: Path) -> None:
    settings = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    LLM(folder, skip_tokenizer=True)


PACKED, BYTES = torch.zeros(8, 64, dtype=torch.int32), torch.zeros(64, 32, dtype=torch.uint8)
ONES = torch.ones(1)
BY_NAME: list[tuple[str, dict[str, torch.Tensor], str]] = [
    ("gptq", {"qweight": PACKED, "qzeros": PACKED, "scales": ONES, "g_idx": PACKED}, "g_idx"),
    ("awq", {"qweight": PACKED, "qzeros": PACKED, "scales": ONES}, "qzeros"),
    ("compressed-tensors", {"weight_packed": PACKED, "weight_scale": ONES, "weight_shape": ONES}, "weight_packed"),
    ("bitsandbytes", {"weight": BYTES, "weight.quant_state.bitsandbytes__nf4": BYTES, "weight.absmax": ONES},
     "weight.quant_state.bitsandbytes__nf4"),
    ("bitsandbytes", {"weight": BYTES.to(torch.int8), "SCB": ONES, "weight_format": BYTES}, "SCB"),
    ("mxfp4", {"weight_blocks": BYTES, "weight_scales": BYTES}, "weight_blocks"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "tensors", "named"), BY_NAME, ids=[format for format, _, _ in BY_NAME])
def test_tensor_names(
    format: str, tensors: dict[str, torch.Tensor], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantise(folder, lambda stem, _: {stem + name: tensor.clone() for name, tensor in tensors.items()})
    names = load_file(folder / "model.safetensors")
    first = next(name for name in names if name.endswith(f"proj.{named}"))
    is_known = format in METHODS_OF_CONFIGS
    check_refused(folder, f"{format}: tensor '{first}'", capsys, NO_SETTINGS if is_known else REMEDY)


def test_fp8_with_scales(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantise(
        folder, lambda stem, w: {f"{stem}weight": w.to(torch.float8_e4m3fn), f"{stem}weight_scale_inv": ONES.clone()}
    )
    first = "model.layers.0.mlp.down_proj.weight_scale_inv"
    check_refused(folder, f"fp8: tensor '{first}'", capsys, NO_SETTINGS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_element_types(dtype: torch.dtype, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of the right names and shapes would be loaded as numbers, without their scales."""
    quantise(folder, lambda stem, weight: {f"{stem}weight": (weight * 50).to(dtype)})
    name = str(dtype).removeprefix("torch.")
    check_refused(folder, f"{name}: tensor 'model.layers.0.mlp.down_proj.weight'", capsys)


def test_packed_weights_of_the_usual_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantise(folder, lambda stem, weight: {f"{stem}weight": weight[:, ::8].to(torch.int32).contiguous()})
    check_refused(folder, "int32: tensor 'model.layers.0.mlp.down_proj.weight'", capsys)


def test_masks_and_indices_are_not_quantised_weights(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(make_checkpoint("GPT2", num_hidden_layers=1), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    LLM(folder, skip_tokenizer=True)
    tensors["extra.position_ids"] = torch.arange(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\n  tensor 'extra.position_ids' \[8\] is unused by the layout$"):
        LLM(folder, skip_tokenizer=True)


def test_float64_weights_are_accepted(folder: Path) -> None:
    quantise(folder, lambda stem, weight: {f"{stem}weight": weight.double()})
    LLM(folder, skip_tokenizer=True)


def test_only_gguf_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4_0.gguf")
    with pytest.raises(CheckpointError) as caught:
        LLM(folder, skip_tokenizer=True)
    assert str(caught.value) == (
        f"{folder} has only GGUF weights (model-q4_0.gguf); pass the file in place of the folder"
    )


def test_an_index_of_quantised_tensors_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its shards, as `sagellm lint model` is used before a download."""
    (folder / "model.safetensors").unlink()
    weight_map = {"model.layers.0.mlp.up_proj.qweight": "a.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert lint_checkpoint(LintRequest("model", folder, None, None, (), False)) == 100
    assert "(int4 packed in int32: tensor 'model.layers.0.mlp.up_proj.qweight')" in capsys.readouterr().out
