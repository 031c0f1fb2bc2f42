"""The shapes that are compared, as Hugging Face checkpoints of random bfloat16 weights, made once and kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model's sizes; `family` is the name of its classes in transformers."""

    family: str
    sizes: dict[str, Any]


COMMON = {"tie_word_embeddings": True, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
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


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of a shape's checkpoint in `cache`; it is made if it is not there."""
    folder = cache / name
    if not (folder / "model.safetensors").exists():
        _make(SHAPES[name], folder)
    return folder


def num_weight_bytes(folder: Path) -> int:
    """Bytes that one decode step reads of the weights: all of them, as the tied table is the head."""
    return (folder / "model.safetensors").stat().st_size


def _make(shape: Shape, folder: Path) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{shape.family}Config")(**COMMON, **shape.sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20GB")
