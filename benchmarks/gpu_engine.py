"""Engine throughput on a checkpoint of random weights of a chosen size."""

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sageLLM import LLM, SamplingParams

TOKENIZER = Path(__file__).parents[1] / "examples/tiny_python_model"
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048}  # fmt: skip


def engine_figures(sizes: dict[str, int], device: str, batches: tuple[int, ...], new_tokens: int) -> dict[str, Any]:
    """Output tokens per second by batch size, for prompts of 128 tokens; from a second run, after compilation."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), sizes)
        llm = LLM(model=folder, device=device, dtype="bfloat16", kernels="triton")
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return {f"batch {batch}": tokens_per_second(llm, params, batch) for batch in batches}


def tokens_per_second(llm: LLM, params: SamplingParams, batch: int, prompt_len: int = 128) -> float:
    speeds = []
    for run in range(2):
        prompts = [[(7 * run + 31 * b + 13 * i) % 2000 + 3 for i in range(prompt_len)] for b in range(batch)]
        start = time.perf_counter()
        done = llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        speeds.append(sum(len(request.outputs[0].token_ids) for request in done) / seconds)
    return speeds[-1]


def write_checkpoint(folder: Path, sizes: dict[str, int]) -> None:
    for path in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(path, folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    config |= {
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config | sizes))
    save_file(random_weights(sizes), folder / "model.safetensors")


def random_weights(sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    H, I, D = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    q, kv = sizes["num_attention_heads"] * D, sizes["num_key_value_heads"] * D
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (sizes["vocab_size"], H), "norm": (H,)}
    for i in range(sizes["num_hidden_layers"]):
        shapes |= {
            f"layers.{i}.self_attn.{name}_proj": shape
            for name, shape in zip("qkvo", ((q, H), (kv, H), (kv, H), (H, q)), strict=True)
        }
        shapes |= {
            f"layers.{i}.mlp.{name}_proj": shape for name, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I)))
        }
        shapes |= {f"layers.{i}.{name}_layernorm": (H,) for name in ("input", "post_attention")}
    return {
        f"model.{name}.weight": (torch.randn(shape) * shape[-1] ** -0.5).bfloat16() for name, shape in shapes.items()
    }
