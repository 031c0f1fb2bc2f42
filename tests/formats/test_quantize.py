"""`sagellm quantize`: codes are the nearest ones or compensate errors; the copy loads with the values of its codes."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.quantize.calibration import sequences_of
from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint
from sageLLM.runtime.quantize.gptq import Hessian, compensated, output_error
from sageLLM.runtime.quantize.rounding import Rounding
from sageLLM.runtime.quantize.scheme import Scheme, scheme_names
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.text.tokenizer import Tokenizer
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


def scheme(name: str) -> Scheme:
    return Scheme.parse(name, load_registry().methods)


def quantised(source: Path, out: Path, name: str, **options: Any) -> Path:
    quantize_checkpoint(source, out, scheme(name), load_registry(), **options)
    return out


@pytest.mark.parametrize("name", [one.replace("{G}", "32") for one in scheme_names(load_registry().methods)])
def test_each_scheme_is_read_with_the_values_of_the_nearest_codes(
    name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Weights of 160 inputs and 96 outputs: neither is a multiple of the blocks of fp8-block."""
    source = make_checkpoint("Llama", **{**SMALL, "intermediate_size": 160}, dtype="bfloat16")
    found = open_checkpoint(quantised(source, tmp_path / "out", name), load_registry())
    for key, weight in load_file(source / "model.safetensors").items():
        expected = Rounding(scheme(name), weight.dtype).nearest(weight).values if "proj" in key else weight
        assert torch.equal(found.read(key, dtype=torch.float32), expected.float())
        if "proj" in key:
            step = 2.0**-4 if name.startswith("fp8") else 2 / (2 ** scheme(name).bits - 1)
            assert (expected - weight.float()).abs().max() < 0.6 * step * weight.float().abs().max()
    answers(tmp_path / "out")


def test_errors_are_compensated_as_by_the_definition() -> None:
    """Column by column with the inverse Hessian of the columns that are left, in float64."""
    random = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(5, 48, generator=random), torch.randn(12, 48, generator=random)
    x = torch.randn(96, 12, generator=random) @ mix + torch.randn(96, 48, generator=random)
    hessian = Hessian(48)
    hessian.add(x)
    rounding = Rounding(scheme("int4-g16"), torch.float32)
    found = compensated(weight, hessian, rounding, "w")
    left = weight.double()
    damped = hessian.sum.double() + 0.01 * hessian.sum.diagonal().mean() * torch.eye(48)
    expected = torch.empty_like(weight)
    for k in range(48):
        if k % 16 == 0:
            scales = left[:, k : k + 16].abs().amax(1) * 2 / 15
        inverse = torch.linalg.inv(damped[k:, k:])
        codes = torch.round(left[:, k] / scales).clamp(-8, 7)
        expected[:, k] = codes
        error = (left[:, k] - codes * scales) / inverse[0, 0]
        left[:, k:] -= error[:, None] * inverse[0]
    assert torch.equal(found.codes, expected)
    assert output_error(weight, found, hessian) < 0.8 * output_error(weight, rounding.nearest(weight), hessian)


def test_an_expert_without_calibration_inputs_has_no_error() -> None:
    weight, hessian = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), Hessian(32)
    rounding = Rounding(scheme("int4-g16"), torch.float32)
    found = compensated(weight, hessian, rounding, "w")
    assert torch.equal(found.codes, rounding.nearest(weight).codes)
    assert output_error(weight, found, hessian) == 0


TINY = Path(__file__).parents[2] / "examples" / "tiny_python_model"


def sequences(folder: str, count: int) -> list[list[int]]:
    """Sequences of 128 tokens of the files of a folder of this repository."""
    text = "".join(path.read_text() for path in sorted((TINY.parents[1] / folder).glob("*.py")))
    return sequences_of(text, Tokenizer.from_folder(TINY).encode, 128, count)


def perplexity(folder: Path, sequences: list[list[int]]) -> float:
    outputs = LLM(folder).generate(sequences, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    total = [
        step[token].logprob
        for sequence, output in zip(sequences, outputs, strict=True)
        for token, step in zip(sequence[1:], (output.prompt_logprobs or [])[1:], strict=True)
        if step is not None
    ]
    return math.exp(-sum(total) / len(total))


def test_compensated_errors_of_the_bundled_model(tmp_path: Path) -> None:
    """Calibrated with other texts than those of the perplexity; each weight has a lower error; bytes are the same."""
    calibration, texts = sequences("runtime/engine", 48), sequences("runtime/kv", 24)
    found = quantize_checkpoint(TINY, tmp_path / "gptq", scheme("int4-g32"), load_registry(), sequences=calibration)
    assert len(found.errors) == found.num_weights == 28
    assert all(one.compensated < one.nearest for one in found.errors.values())
    nearest = quantised(TINY, tmp_path / "nearest", "int4-g32")
    own, other, plain = (perplexity(folder, texts) for folder in (tmp_path / "gptq", nearest, TINY))
    assert plain < own < other
    again = quantised(TINY, tmp_path / "again", "int4-g32", sequences=calibration)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "gptq/model.safetensors").read_bytes()


def test_the_command_with_a_calibration_text(tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text((TINY.parents[1] / "runtime/errors.py").read_text())
    arguments = ["quantize", str(TINY), str(tmp_path / "out"), "--format", "int4-g64", "--method", "gptq"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and "--method gptq requires --calibration FILE" in done.output
    arguments += ["--calibration", str(text), "--sample-len", "64", "--num-samples", "4", "--include-head"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "29 weights in int4-g64" in done.output, done.output
    assert "mean relative error of layer outputs" in done.output
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= stored.keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["quantization_config"]["ignore"] == []
    answers(tmp_path / "out")


@pytest.mark.parametrize("family", ["Qwen3Moe", "Phi3", "Gemma2"])
def test_experts_and_fused_weights_are_calibrated(family: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Experts have the Hessian of their own tokens; one tensor may be several weights of the graph."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32} if family == "Qwen3Moe" else {}
    source = make_checkpoint(family, **SMALL, **sizes)
    texts = [[i * 7 % 190 for i in range(start, start + 40)] for start in (3, 90)]
    found = quantize_checkpoint(source, tmp_path / "out", scheme("int4-g32"), load_registry(), sequences=texts)
    assert len(found.errors) == found.num_weights > 6
    answers(tmp_path / "out")


def test_what_cannot_be_quantised(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Llama", **SMALL)
    with pytest.raises(CheckpointError, match="--format must be one of awq-gG, int4-gG, int4, int8-gG, int4-zeros-gG"):
        scheme("int3")
    with pytest.raises(CheckpointError, match="must have linear weights with whole groups of inputs"):
        quantised(source, tmp_path / "out", "int4-g256")
    with pytest.raises(CheckpointError, match="--format int4-g12: groups must be multiples of 8"):
        scheme("int4-g12")
    quantised(source, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="already exists"):
        quantised(source, tmp_path / "out", "int8")
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantised(tmp_path / "out", tmp_path / "again", "int8")
    with pytest.raises(CheckpointError, match="sequences must have from 1 to"):
        quantised(source, tmp_path / "long", "int8", sequences=[[1] * 4000])


@pytest.mark.parametrize("form", ["int8", "int4-zeros-g32", "fp8-block", "awq-g32"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    form: str, number: float, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Their whole groups would be NaN."""
    source = make_checkpoint("Llama", **SMALL)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"'model\.layers\.1\.mlp\.up_proj\.weight' has values that {form} does not have"
    ):
        quantised(source, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_routers_are_kept(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Qwen3Moe", **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    quantised(source, tmp_path / "out", "int4-g32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.gate.weight" in stored and "model.layers.0.mlp.experts.0.up_proj.weight_packed" in stored
    assert "model.embed_tokens.weight" in stored
    answers(tmp_path / "out")
