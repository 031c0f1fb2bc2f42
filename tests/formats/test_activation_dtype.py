"""Models with activations of 8 bits (W8A8, W4A8): the answers are those of the torch references in the same mode."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sageLLM import LLM
from sageLLM.runtime.convert.convert import convert
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor.kernel_choice import choose_planner
from sageLLM.runtime.kernels.int8_activations import Int8Weight
from sageLLM.runtime.registry.plugins import load_registry
from tests.formats import packers
from tests.formats.test_checkpoints import GREEDY, PROMPTS, SMALL, Answers, answers

MakeCheckpoint = Callable[..., Path]
MODE = {"activation_dtype": "int8"}
EXPERTS = ("proj.weight", "w1.weight", "w2.weight", "w3.weight")


def assert_near(found: Answers, expected: Answers, atol: float) -> None:
    """Equal tokens, and log-probabilities that differ by the order of float sums."""
    for (tokens, logprobs), (other_tokens, other) in zip(found, expected, strict=True):
        assert tokens == other_tokens
        assert torch.allclose(torch.tensor(logprobs), torch.tensor(other), atol=atol)


@pytest.mark.parametrize("method", ["packed with zeros", "packed, 8 bits", "nvfp4"])
def test_the_answers_are_those_of_the_references(method: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, method)
    found = answers(folder, dtype="float32", **MODE)
    assert_near(found, answers(folder, dtype="float32", kernels="reference", **MODE), 1e-3)
    exact = answers(folder, dtype="float32")
    assert [logprobs for _, logprobs in found] != [logprobs for _, logprobs in exact]
    for (_, one), (_, other) in zip(found, exact, strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=0.2)


def test_experts_have_the_answers_of_the_references(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint("Mixtral", **SMALL, num_local_experts=4)
    folder = packers.quantise(source, tmp_path, "packed, 8 bits", names=EXPERTS)
    llm = LLM(folder, skip_tokenizer=True, dtype="bfloat16", **MODE)
    (one,) = (one for one in llm.weight_stats() if one.form.startswith("int8"))
    assert one.kernel.endswith(", activations in int8")
    found = answers(folder, dtype="float32", **MODE)
    assert_near(found, answers(folder, dtype="float32", kernels="reference", **MODE), 1e-3)


def test_gguf_files(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """With a tied head of codes, which is read by `embedding` as it is."""
    source = make_checkpoint("Llama", **SMALL, tie_word_embeddings=True)
    for form in ("q8_0", "q4_0"):
        convert(source, tmp_path / f"{form}.gguf", load_registry(), form)
        found = answers(tmp_path / f"{form}.gguf", dtype="float32", **MODE)
        expected = answers(tmp_path / f"{form}.gguf", dtype="float32", kernels="reference", **MODE)
        assert_near(found, expected, 1e-3)


def test_ranks_round_the_activations_of_one_process(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Shares of inputs are whole groups of 32, so that they have the scales of the whole row."""
    source = make_checkpoint("Llama", **SMALL, intermediate_size=128)
    folder = packers.quantise(source, tmp_path, "packed")
    llm = LLM(folder, skip_tokenizer=True, dtype="float32", tensor_parallel_size=2, **MODE)
    try:
        tokens = [list(one.outputs[0].token_ids) for one in llm.generate(PROMPTS, GREEDY)]
    finally:
        llm.close()
    assert tokens == [tokens for tokens, _ in answers(folder, dtype="float32", **MODE)]


def test_weights_of_floats_keep_their_activations(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, "fp8")
    with pytest.raises(SageError, match=r"activation_dtype must be 'auto' for .*: no weight is kept as integer codes"):
        LLM(folder, skip_tokenizer=True, **MODE)


def test_settings_that_no_weight_uses_are_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint("Llama", **SMALL)
    with pytest.raises(SageError, match=r"activation_dtype must be 'auto' for .*: its weights are not quantised"):
        LLM(folder, skip_tokenizer=True, **MODE)
    with pytest.raises(SageError, match="activation_dtype must be one of auto, int8, got 'int4'"):
        LLM(folder, skip_tokenizer=True, activation_dtype="int4")
    with pytest.raises(SageError, match="activation_dtype must not be combined with weights_tier='disk'"):
        LLM(folder, skip_tokenizer=True, weights_tier="disk", **MODE)
    with pytest.raises(SageError, match="activation_dtype requires device 'cpu', got 'cuda'"):
        LLM(folder, skip_tokenizer=True, device="cuda", **MODE)


def test_triton_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sageLLM.runtime.executor.kernel_choice.why_no_triton", lambda device: None)
    with pytest.raises(SageError, match="activation_dtype must be 'auto' with Triton kernels, got 'int8'; or use"):
        choose_planner("triton", load_registry(), torch.device("cpu"), "bf16", activations="int8")


def test_declared_activations_are_reported(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A W8A8 checkpoint has the values of its weights by default, and says so."""
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, "int8")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    path.write_text(json.dumps(config))
    assert answers(folder) == answers(tmp_path / "plain")

    def kernel(**options: object) -> str:
        stats = LLM(folder, skip_tokenizer=True, dtype="bfloat16", **options).weight_stats()
        return next(one.kernel for one in stats if one.form.startswith("int8"))

    assert kernel().endswith(
        ", activations in bfloat16, although the checkpoint declares int8: activation_dtype='int8' rounds them"
    )
    assert kernel(**MODE).endswith(", activations in int8")


def test_references_run_without_a_compiler(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packers.quantise(make_checkpoint("Llama", **SMALL), tmp_path, "packed")
    expected = answers(folder, dtype="float32", kernels="reference", **MODE)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "empty"))
    llm = LLM(folder, skip_tokenizer=True, dtype="float32", **MODE)
    assert any(isinstance(one, Int8Weight) for one in llm.model.weights.values())
    assert [list(one.outputs[0].token_ids) for one in llm.generate(PROMPTS, GREEDY)] == [one for one, _ in expected]
