"""Quantised checkpoints: the answers are those of the checkpoint with the dequantised values, bit for bit."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sageLLM import LLM, SamplingParams
from sageLLM.codegen import driver
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.kernels.cpu.coded import CodedWeight, decoded
from sageLLM.runtime.kernels.cpu.native import KernelUse, NativeRunner
from sageLLM.runtime.loader.model import load_model
from sageLLM.runtime.registry.plugins import load_registry
from tests.formats import packers

MakeCheckpoint = Callable[..., Path]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
PROMPTS = [[5, 80, 13, 2, 150], [7] * 12]
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 64}
Answers = list[tuple[list[int], list[float]]]


def answers(folder: Path, **options: object) -> Answers:
    found = []
    for one in LLM(folder, skip_tokenizer=True, **options).generate(PROMPTS, GREEDY):
        assert one.prompt_logprobs is not None
        logprobs = [next(iter(step.values())).logprob for step in one.prompt_logprobs if step is not None]
        found.append((list(one.outputs[0].token_ids), logprobs))
    return found


@pytest.mark.parametrize("method", [name for name in packers.METHODS if name != "mlx"])
def test_the_answers_are_those_of_the_dequantised_checkpoint(
    method: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, method)
    assert answers(folder) == answers(tmp_path / "plain")


def test_a_format_by_yaml_alone(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The worked example of docs/formats.md: no line of Python knows the format."""
    out = tmp_path / "generated"
    driver.generate([driver.PACKAGE / "examples" / "add_a_format" / "specs"], out=out)
    source = make_checkpoint("Llama", **SMALL)
    folder = packers.quantise(source, tmp_path, "mlx")
    with pytest.raises(
        CheckpointError, match=r"quantised \(mlx, 4 bits: 'quantization' in config.json\), which is not"
    ):
        LLM(folder, skip_tokenizer=True)
    assert answers(folder, plugins=[out]) == answers(tmp_path / "plain")


@pytest.mark.parametrize(("method", "form"), [("gptq in order of activations", None), ("packed with zeros", "int4")])
def test_a_share_of_a_rank_is_that_of_the_dequantised_weights(
    method: str, form: str | None, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = packers.quantise(make_checkpoint("Llama", **SMALL, intermediate_size=128), tmp_path, method)
    options = {"dtype": "float32", "device": torch.device("cpu"), "max_model_len": None, "tp": 2, "keeps_codes": True}
    for rank in range(2):
        model, plain = (
            load_model(path, load_registry(), rank=rank, **options) for path in (folder, tmp_path / "plain")
        )
        coded = {name: one for name, one in model.weights.items() if isinstance(one, CodedWeight)}
        assert {one.form for one in coded.values()} == {form} - {None}
        assert len(coded) + len(model.dequantized) == 4 * SMALL["num_hidden_layers"]
        assert set(model.dequantized.values()) <= {"groups in the order of activations"}
        whole = model.weights | {name: decoded(one) for name, one in coded.items()}
        assert whole.keys() == plain.weights.keys()
        assert all(torch.equal(whole[name], plain.weights[name]) for name in whole)


def test_weights_stay_packed_in_kernels_of_16_bits(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Of experts, too; log-probabilities differ by roundings from those of float weights."""
    source = make_checkpoint("Mixtral", **SMALL, num_local_experts=4)
    folder = packers.quantise(
        source, tmp_path, "packed, 8 bits", names=("proj.weight", "w1.weight", "w2.weight", "w3.weight")
    )
    llm = LLM(folder, skip_tokenizer=True, dtype="bfloat16")
    assert [one.form for one in llm.weight_stats() if one.form.startswith("int8")] == ["int8 in groups of 32"]
    assert not any(one.reason for one in llm.weight_stats())
    found, expected = answers(folder, dtype="bfloat16"), answers(folder, dtype="bfloat16", kernels="reference")
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=0.05)


def test_kernels_are_built_for_the_forms_of_the_weights_alone(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of codes take seconds to compile, and those of floats are then not called."""
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, "packed, 8 bits")
    found: set[KernelUse] = set()
    prepare = NativeRunner.prepare

    def record(runner: NativeRunner, uses: Iterable[KernelUse]) -> None:
        found.update(wanted := list(uses))
        prepare(runner, wanted)

    monkeypatch.setattr(NativeRunner, "prepare", record)
    answers(folder, dtype="bfloat16")
    forms = {use.op: {one.form for one in found if one.op == use.op} for use in found}
    assert forms["linear"] == forms["linear_silu_mul"] == {"int8"}
    assert forms["lm_head_sample"] == forms["rms_norm"] == {None}


@pytest.mark.parametrize(
    ("method", "form"),
    [("fp8 in blocks", "fp8 in groups of 16"), ("fp8", "fp8 by output"), ("nvfp4", "fp4 in groups of 16")],
)
def test_small_floats_stay_packed(method: str, form: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, method)
    found = LLM(folder, skip_tokenizer=True, dtype="bfloat16").weight_stats()
    assert [one.form for one in found if one.form != "bfloat16"] == [form]
    assert not any(one.reason for one in found)
    pairs = zip(answers(folder, dtype="bfloat16"), answers(tmp_path / "plain", dtype="float32"), strict=True)
    for (_, one), (_, other) in pairs:
        assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=0.1)


def test_weights_on_disk_are_dequantised(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, "packed")
    expected = answers(tmp_path / "plain")
    assert answers(folder, weights_tier="disk", weights_folder=str(tmp_path / "weights")) == expected


def test_the_experts_of_gpt_oss(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """In MXFP4, with the rows of gate and up in turn, against transformers with the values that it dequantises."""
    settings = {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    source = make_checkpoint("GptOss", **settings)
    random = torch.Generator().manual_seed(8)
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=random, dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:-1], generator=random, dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales).float().contiguous()
        else:
            stored[name] = plain[name] = tensor
    for name, tensors in (("quantised", stored), ("plain", plain)):
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    lists = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    section = {"quant_method": "mxfp4", "modules_to_not_convert": lists}
    packers.edit_config(tmp_path / "quantised", quantization_config=section)
    found = answers(tmp_path / "quantised")
    assert found == answers(tmp_path / "plain")
    forms = LLM(tmp_path / "quantised", skip_tokenizer=True).weight_stats()
    assert "fp4 in groups of 32" in {one.form for one in forms} and not any(one.reason for one in forms)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    for prompt, (_, logprobs) in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = logits[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-4)


@pytest.mark.parametrize("is_quantised", [True, False])
def test_scales_for_the_kv_cache(is_quantised: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A calibrated checkpoint has the answers of one without the scales, in every form of the cache."""
    source = make_checkpoint("Llama", **SMALL)
    plain = packers.quantise(source, tmp_path, "packed") if is_quantised else source
    folder = Path(shutil.copytree(plain, tmp_path / "calibrated"))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(SMALL["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.self_attn.{name}": torch.tensor([0.03]) for name in ("k_scale", "v_scale")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if is_quantised:
        config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "symmetric": True}
    (folder / "config.json").write_text(json.dumps(config))
    for form in ("auto", "fp8"):
        assert answers(folder, kv_cache_dtype=form) == answers(plain, kv_cache_dtype=form)
