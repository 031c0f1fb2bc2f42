"""`sagellm quantize`: codes are the nearest ones, the copy loads, and its answers are those of the rounded weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sageLLM.runtime.cli.main import app
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.quantize import Scheme, quantize_checkpoint
from tests.formats.test_checkpoints import SMALL, answers

MakeCheckpoint = Callable[..., Path]


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """The nearest multiples of the scale of each group, which spans the range of the codes."""
    found = torch.empty_like(weight)
    for n in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[n, start : start + group]
            scale = part.abs().max() / ((2**bits - 1) / 2)
            codes = torch.clamp(torch.round(part / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            found[n, start : start + group] = codes * scale
    return found


@pytest.mark.parametrize(("format", "bits", "group"), [("int8", 8, None), ("int4-g32", 4, 32)])
def test_the_answers_are_those_of_the_rounded_weights(
    format: str, bits: int, group: int | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint("Llama", **SMALL)
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), "--format", format])
    assert done.exit_code == 0, done.output
    shutil.copytree(source, tmp_path / "plain")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = rounded(tensor, bits, group or tensor.shape[1])
    save_file(tensors, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    assert answers(tmp_path / "out") == answers(tmp_path / "plain")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == ["lm_head"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum("weight_scale" in name for name in stored) == 14


def test_what_cannot_be_quantised(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Llama", **SMALL)
    with pytest.raises(CheckpointError, match="--format must be int8 or int4-g16"):
        Scheme.parse("int3")
    with pytest.raises(CheckpointError, match="must have linear weights with whole groups of inputs"):
        quantize_checkpoint(source, tmp_path / "out", Scheme(4, 256))
    quantize_checkpoint(source, tmp_path / "out", Scheme(8))
    with pytest.raises(CheckpointError, match="already exists"):
        quantize_checkpoint(source, tmp_path / "out", Scheme(8))
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", Scheme(8))


def test_routers_are_kept(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Qwen3Moe", **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    quantize_checkpoint(source, tmp_path / "out", Scheme(4, 32))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.gate.weight" in stored and "model.layers.0.mlp.experts.0.up_proj.weight_packed" in stored
    assert "model.embed_tokens.weight" in stored
    answers(tmp_path / "out")
