"""Configs and tensor names of the architectures of GGUF files, as those of Hugging Face checkpoints."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.loader.gguf_reader import GgufHeader

_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
"""Keys of config.json, and those of the metadata after the name of the architecture."""
_EXPERT_KEYS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
_OPTIONAL = ("num_key_value_heads", "head_dim")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
ROPE_FACTORS = "rope_freqs.weight"
"""A tensor with the factors of the wave lengths of Llama 3.1 and later."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of Hugging Face, with further keys of its config.

    `is_permuted`: the rows of q and k are in the order of rotation of adjacent components.
    """

    hf: str
    is_permuted: bool = False
    keys: Mapping[str, str] = field(default_factory=lambda: _KEYS)
    constants: tuple[tuple[str, Any], ...] = ()


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", is_permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", keys={**_KEYS, **_EXPERT_KEYS}, constants=(("norm_topk_prob", True),)
    ),
}
"""By `general.architecture`."""


def architecture_of(header: GgufHeader) -> Architecture:
    """Raises CheckpointError for an architecture without an entry, and for a file of several."""
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{header.path}: 'general.architecture' must be one of {known}, got {shown(name)}")
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(f"{header.path}: 'split.count' must be 1; merge the files with llama-gguf-split --merge")
    return ARCHITECTURES[name]


def config_of(header: GgufHeader, factors: Sequence[float] | None, dtype: str) -> dict[str, Any]:
    """A config.json with the sizes and the rotation of the metadata; `factors` are the values of ROPE_FACTORS."""
    architecture = architecture_of(header)
    name = header.metadata["general.architecture"]
    config: dict[str, Any] = {"architectures": [architecture.hf], "dtype": dtype}
    for key, stored in architecture.keys.items():
        value = header.metadata.get(f"{name}.{stored}")
        if value is None and key in _OPTIONAL:
            continue
        if type(value) not in (int, float):
            raise CheckpointError(f"{header.path}: '{name}.{stored}' must be a number, got {shown(value)}")
        config[key] = value
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{header.path}: expected the tensor 'token_embd.weight'; pass a file with a whole model")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    config |= {key: header.metadata[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id")
               if f"tokenizer.ggml.{key}" in header.metadata}  # fmt: skip
    return {**config, **dict(architecture.constants), "rope_parameters": _rope(header, name, factors)}


def _rope(header: GgufHeader, name: str, factors: Sequence[float] | None) -> dict[str, Any]:
    """The section `rope_parameters`."""
    metadata = header.metadata
    theta = metadata.get(f"{name}.rope.freq_base", 10000.0)
    kind = metadata.get(f"{name}.rope.scaling.type", "none")
    if factors is not None:
        return _llama3(header, theta, factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = metadata.get(f"{name}.rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        original = metadata.get(f"{name}.rope.scaling.original_context_length")
        section = {"rope_type": "yarn", "rope_theta": theta, "factor": factor}
        return section | ({} if original is None else {"original_max_position_embeddings": original})
    raise CheckpointError(f"{header.path}: '{name}.rope.scaling.type' must be none, linear or yarn, got {shown(kind)}")


def _llama3(header: GgufHeader, theta: float, factors: Sequence[float]) -> dict[str, Any]:
    """The settings of Llama 3 with these factors, which are compared with those that the settings define."""
    factor = max(factors, default=1.0)
    section = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = list(_llama3_factors(theta, factor, len(factors)))
    if not all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(factors, expected, strict=True)):
        raise CheckpointError(f"{header.path}: the tensor '{ROPE_FACTORS}' must have the factors of Llama 3")
    return section


def _llama3_factors(theta: float, factor: float, count: int) -> Iterator[float]:
    """1 for short wave lengths, `factor` for long ones, and between them a smooth transition."""
    longest, shortest = 8192 / 1.0, 8192 / 4.0
    for i in range(count):
        length = 2 * math.pi * theta ** (i / count)
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        transition = 1 / ((1 - smooth) / factor + smooth) if smooth else factor
        yield 1.0 if length < shortest else factor if length > longest else transition


def names_of(stored: str) -> tuple[str, Callable[[int], str] | None] | None:
    """The name in Hugging Face checkpoints, and for a stack of experts that of each; None for an unknown name."""
    stem, _, end = stored.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2) if stem.count(".") >= 2 else ("", "", "")
        prefix = f"model.layers.{layer}."
    if stem in _NAMES and bool(prefix) == (not _NAMES[stem].startswith(("model.", "lm_head"))):
        return f"{prefix}{_NAMES[stem]}.{end}", None
    if prefix and stem in _EXPERTS:
        return stored, lambda expert: f"{prefix}mlp.experts.{expert}.{_EXPERTS[stem]}.{end}"
    return None
