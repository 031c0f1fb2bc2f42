"""The shapes that are compared, as Hugging Face checkpoints of random bfloat16 weights, made once and kept."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MAX_LEN = 8832
"""Tokens of the longest sequence of a workload, with room for its answer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model's sizes; `family` is the name of its classes in transformers."""

    family: str
    sizes: dict[str, Any]


COMMON = {
    "tie_word_embeddings": True,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "135m": Shape(  # SmolLM-135M
        "Llama",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
        },
    ),
    "0.6b": Shape(  # Qwen3-0.6B
        "Qwen3",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "vocab_size": 151936,
        },
    ),
}


CHECK_SIZES = {"vocab_size": 4096, "tie_word_embeddings": False, "initializer_range": 0.04}
CHECK_LAYERS = {"135m": 8, "0.6b": 4}
WEIGHT_BYTES = {"bf16": 2.0, "f16": 2.0, "fp16": 2.0, "int8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a shape: weights of the layers and of the head, and per token KV values and heads."""

    layer_weights: int
    head_weights: int
    kv_values: int
    attention_flops: int

    def decode_bytes(self, form: str, context: int) -> float:
        """Bytes that a decode step of one sequence reads: all weights once, and 16-bit keys and values."""
        return (self.layer_weights + self.head_weights) * WEIGHT_BYTES[form] + 2 * context * self.kv_values

    def prompt_flops(self, length: int) -> float:
        """Operations of a prompt: the layers for every token, the head for the last one, causal attention."""
        pairs = length * (length + 1) / 2
        return 2.0 * self.layer_weights * length + 2 * self.head_weights + self.attention_flops * pairs


def work_of(name: str) -> Work:
    """The work of a shape."""
    size = SHAPES[name].sizes
    hidden, layers, heads = size["hidden_size"], size["num_hidden_layers"], size["num_attention_heads"]
    width = size.get("head_dim", hidden // heads)
    kv = size["num_key_value_heads"] * width
    attention = hidden * (heads * width + 2 * kv) + heads * width * hidden
    return Work(
        layer_weights=layers * (attention + 3 * hidden * size["intermediate_size"]),
        head_weights=size["vocab_size"] * hidden,
        kv_values=2 * layers * kv,
        attention_flops=4 * layers * heads * width,
    )


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of a shape's checkpoint in `cache`; it is made if it is not there."""
    return _made(SHAPES[name], cache / name)


def check_checkpoint(name: str, cache: Path) -> Path:
    """The checkpoint of the correctness check: fewer layers of the shape, an untied head, large weights."""
    shape = SHAPES[name]
    sizes = {**shape.sizes, **CHECK_SIZES, "num_hidden_layers": CHECK_LAYERS[name]}
    return _made(replace(shape, sizes=sizes), cache / f"{name}-check")


def _made(shape: Shape, folder: Path) -> Path:
    """A checkpoint made for shorter sequences has the same weights, so that only its config changes."""
    if not (folder / "model.safetensors").exists():
        _make(shape, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["max_position_embeddings"] < MAX_LEN:
        config["max_position_embeddings"] = MAX_LEN
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _make(shape: Shape, folder: Path) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{shape.family}Config")(**{**COMMON, **shape.sizes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20GB")
