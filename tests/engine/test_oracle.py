"""The engine against transformers: greedy tokens are equal and prompt log-probabilities agree within 1e-4."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.worker.executor import InProcessExecutor

FIXED_MODES = ("time_share", "hybrid", "strict")
MODES = (*FIXED_MODES, "auto")
LOGPROB_TOLERANCE = 1e-4
NUM_NEW = 12
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
Answers = list[tuple[list[int], list[float]]]
"""For each prompt: the generated tokens, and the log-probability of each prompt token after the first."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama without grouping": ("Llama", {"num_key_value_heads": 4}),
    "llama one kv head, own head_dim": ("Llama", {"num_key_value_heads": 1, "head_dim": 24}),
    "mistral with a window": ("Mistral", {"sliding_window": 7}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 tied with bias": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen2 with a window in the upper layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "layer_types": None},
    ),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3 with windows in named layers": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo2 with biases, without grouping": ("Olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "no_rope_layers": None, "pad_token_id": 0}),
    "smollm3, windows where nothing rotates": (
        "SmolLM3",
        {
            "use_sliding_window": True,
            "sliding_window": 11,
            "no_rope_layers": [0, 1, 0],
            "layer_types": None,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.05,
            "logits_scaling": 16.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9}),
    "gemma2 without caps, untied": (
        "Gemma2",
        {
            "head_dim": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("Phi3", {}),
    "phi3 with a window, tied": ("Phi3", {"sliding_window": 9, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "gpt2": ("GPT2", {"n_inner": 96}),
    "phi3 with partial rotation": ("Phi3", {"partial_rotary_factor": 0.75}),
    "gpt2 untied, four times as wide inside": ("GPT2", {"tie_word_embeddings": False}),
    "gpt2 scaled by layer, with gelu": (
        "GPT2",
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu"},
    ),
    "gpt2 unscaled, with relu": ("GPT2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "gpt_neox, sequential residual": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt_neox tied, without attention biases": ("GPTNeoX", {"tie_word_embeddings": True, "attention_bias": False}),
    "falcon 40b: grouped, two norms": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b: grouped, one norm": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 96},
    ),
    "falcon 7b: one key head": ("Falcon", {"tie_word_embeddings": False}),
    "falcon in sequence, all heads, biases": ("Falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "gptj": ("GPTJ", {"rotary_dim": 8, "n_inner": 96}),
    "gptj, whole heads rotated, tied": ("GPTJ", {"rotary_dim": 16, "tie_word_embeddings": True}),
    "bloom": ("Bloom", {"n_head": 4}),
    "bloom, heads not a power of two": ("Bloom", {"n_head": 6, "hidden_size": 48, "tie_word_embeddings": False}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm, half of a head rotated": (
        "StableLm",
        {"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}},
    ),
    "phi": ("Phi", {}),
    "cohere": ("Cohere", {"num_key_value_heads": 2}),
    "cohere with norms of heads": ("Cohere", {"use_qk_norm": True, "logit_scale": 0.5, "tie_word_embeddings": False}),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3 with scaled positions and capped logits": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "final_logit_softcapping": 5.0,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "opt": ("OPT", {"ffn_dim": 96}),
    "opt, post-norms, narrow embeddings": (
        "OPT",
        {"ffn_dim": 96, "do_layer_norm_before": False, "word_embed_proj_dim": 32, "activation_function": "gelu"},
    ),
    "glm4": ("Glm4", {"head_dim": 16}),
    "cohere2": (
        "Cohere2",
        {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "nemotron": ("Nemotron", {"attention_bias": True, "mlp_bias": True}),
    "olmo with clipped projections": ("Olmo", {"clip_qkv": 0.7}),
    "rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "rope dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}}),
    "rope llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "rope yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}

MakeCheckpoint = Callable[..., Path]


def random_prompts(vocab_size: int, lengths: tuple[int, ...], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = random_prompts(199, (1, 5, 16, 17, 33, 70))


@torch.inference_mode()
def expected(folder: Path, prompts: list[list[int]], answers: Answers) -> Answers:
    """The answers of transformers: the argmax after each prompt and after each token of `answers`.

    If these equal the tokens of `answers`, they are transformers' greedy tokens, by induction over the positions. One
    forward pass per prompt decides that, where generation would take a pass per token.
    """
    is_nested = "text_config" in json.loads((folder / "config.json").read_text())
    auto = transformers.AutoModelForImageTextToText if is_nested else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0]
        logprobs = logits[: len(prompt)].log_softmax(-1)
        of_prompt = [logprobs[i, token].item() for i, token in enumerate(prompt[1:])]
        found.append((logits[len(prompt) - 1 : -1].argmax(-1).tolist(), of_prompt))
    return found


def serve(folder: Path, prompts: list[list[int]], mode: str, **settings: Any) -> Answers:
    """The engine's answers."""
    llm = load(folder, mode, **settings)
    found = answers_of(prompts, llm.generate(prompts, GREEDY))
    llm.engine.scheduler.check_integrity()
    return found


def load(folder: Path, mode: str, **settings: Any) -> LLM:
    config = scheduler_config(mode, **settings.pop("scheduler", {}))
    return LLM(folder, dtype="float32", skip_tokenizer=True, scheduler=config, **settings)


def scheduler_config(mode: str, **limits: Any) -> PDSchedulerConfig:
    return PDSchedulerConfig(mode=mode, **{"prefill_chunk_size": 8, "max_prefill_tokens": 24} | limits)


def answers_of(prompts: list[list[int]], outputs: list[RequestOutput]) -> Answers:
    answers = []
    for prompt, output in zip(prompts, outputs, strict=True):
        scored = output.prompt_logprobs or ()
        of_prompt = [entry[token].logprob for entry, token in zip(scored[1:], prompt[1:], strict=True) if entry]
        answers.append((list(output.outputs[0].token_ids), of_prompt))
    return answers


def serve_in_modes(llm: LLM, prompts: list[list[int]], modes: tuple[str, ...]) -> dict[str, Answers]:
    """The answers in each mode, by one engine per mode on the same model and the same optimised graphs."""
    found = {}
    for mode in modes:
        config, budget = scheduler_config(mode), KVBudget(256)
        executor = InProcessExecutor(llm.model, llm.compiler, budget, is_split=mode == "strict", is_async=True)
        engine = Engine(llm.model, None, llm.compiler, config, budget, executor)
        for i, prompt in enumerate(prompts):
            engine.add(str(i), None, prompt, GREEDY)
        outputs: dict[str, RequestOutput] = {}
        while engine.has_work:
            outputs |= {output.request_id: output for output in engine.step(only_finished=True)}
        engine.scheduler.check_integrity()
        found[mode] = answers_of(prompts, [outputs[str(i)] for i in range(len(prompts))])
    return found


def assert_same(found: Answers, reference: Answers) -> None:
    for (tokens, logprobs), (reference_tokens, reference_logprobs) in zip(found, reference, strict=True):
        assert tokens == reference_tokens
        assert logprobs == pytest.approx(reference_logprobs, abs=LOGPROB_TOLERANCE)


def check_all_modes(folder: Path, modes: tuple[str, ...] = FIXED_MODES, **settings: Any) -> None:
    """The engine's answers to PROMPTS equal those of transformers in each mode."""
    found = serve_in_modes(load(folder, modes[0], **settings), PROMPTS, modes)
    reference = expected(folder, PROMPTS, found[modes[0]])
    for mode in modes:
        assert_same(found[mode], reference)


@pytest.mark.parametrize("case", CASES)
def test_engine_equals_transformers_in_every_mode(case: str, make_checkpoint: MakeCheckpoint) -> None:
    """In all fixed modes, and for one family in mode `auto`, which runs the same graphs in another order."""
    family, config = CASES[case]
    check_all_modes(make_checkpoint(family, **config), MODES if case == "llama" else FIXED_MODES)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_scaling_serves_sequences_beyond_the_positions_of_the_config(
    kind: str, make_checkpoint: MakeCheckpoint
) -> None:
    """The frequencies of both are independent of the length, so the reference is the same forward pass."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 32} if kind == "yarn" else {}
    folder = make_checkpoint("Llama", rope_parameters=rope, max_position_embeddings=32)
    llm = load(folder, "hybrid")
    assert llm.model.max_model_len == 128
    found = answers_of(PROMPTS, llm.generate(PROMPTS, GREEDY))
    assert_same(found, expected(folder, PROMPTS, found))


@pytest.mark.parametrize("mode", MODES)
def test_batched_equals_alone(mode: str, make_checkpoint: MakeCheckpoint) -> None:
    llm = load(make_checkpoint("Llama"), mode, enable_prefix_caching=False)
    together = answers_of(PROMPTS, llm.generate(PROMPTS, GREEDY))
    alone = [answers_of([prompt], llm.generate([prompt], GREEDY))[0] for prompt in PROMPTS]
    assert_same(together, alone)


@pytest.mark.parametrize("mode", MODES)
def test_chunked_equals_unchunked(mode: str, make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("Llama")
    whole = serve(folder, PROMPTS, mode, scheduler={"prefill_chunk_size": 256, "max_prefill_tokens": 512})
    assert_same(serve(folder, PROMPTS, mode, scheduler={"prefill_chunk_size": 3, "max_prefill_tokens": 9}), whole)


@pytest.mark.parametrize("mode", ("time_share", "hybrid"))
def test_preempted_equals_undisturbed(mode: str, make_checkpoint: MakeCheckpoint) -> None:
    """A pool that holds about two of the sequences forces preemptions, which do not show in the answers."""
    folder = make_checkpoint("Llama")
    config = PDSchedulerConfig(mode=mode)
    llm = LLM(folder, dtype="float32", skip_tokenizer=True, scheduler=config, block_size=4, num_kv_blocks=22)
    found = answers_of(PROMPTS, llm.generate(PROMPTS, GREEDY))
    assert llm.engine.scheduler.get_stats()["total_preemptions"] > 0, "the pool was meant to be too small"
    assert_same(found, expected(folder, PROMPTS, found))


def test_a_sharded_checkpoint_is_read_through_its_index(make_checkpoint: MakeCheckpoint) -> None:
    sharded = make_checkpoint("Llama", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same(serve(sharded, PROMPTS[:3], "hybrid"), serve(make_checkpoint("Llama"), PROMPTS[:3], "hybrid"))


def test_a_checkpoint_of_the_bare_model_lacks_the_prefix(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Like gpt2 on the hub: names without the prefix, and buffers with the causal mask."""
    folder = make_checkpoint("GPT2", n_inner=96)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    shutil.copy(folder / "config.json", tmp_path)
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, tmp_path / "model.safetensors")
    assert_same(serve(tmp_path, PROMPTS[:3], "hybrid"), serve(folder, PROMPTS[:3], "hybrid"))


def test_passes_do_not_change_the_answers(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("Qwen3", head_dim=32)
    assert_same(serve(folder, PROMPTS, "hybrid", disable_passes=["all"]), serve(folder, PROMPTS, "hybrid"))


def test_strict_migrates_the_kv_cache(make_checkpoint: MakeCheckpoint) -> None:
    """The decode worker's pool receives the prefill worker's KV bit for bit: copied, not computed again."""
    folder = make_checkpoint("Llama")
    config = PDSchedulerConfig(mode="strict")
    llm = LLM(folder, dtype="float32", skip_tokenizer=True, scheduler=config, block_size=4)
    prompt = PROMPTS[4]
    llm.generate([prompt], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    num_full_blocks = len(prompt) // 4
    for layer in range(3):
        sent = _used_blocks(llm.engine.executor.prefiller.runner.pool.keys[layer])[:num_full_blocks]
        received = _used_blocks(llm.engine.executor.decoder.runner.pool.keys[layer])[:num_full_blocks]
        assert torch.equal(sent, received)


def _used_blocks(keys: torch.Tensor) -> torch.Tensor:
    return keys[keys.flatten(1).any(dim=1)]
