"""Writes GGUF files of checkpoints, as llama.cpp's converter names and orders their tensors; blocks are random."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sageLLM.generated.formats import METHODS
from sageLLM.generated.formats.values import VALUES

FORMATS = {one.name: one for one in METHODS["gguf"].formats}
NAMES = {
    "embed_tokens": "token_embd",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "norm": "output_norm",
    "lm_head": "output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
NORMS_AFTER = ("gemma2", "gemma3", "olmo2", "seed_oss")
"""Architectures that have the norm `post_attention_layernorm` after attention, or under this name."""
PERMUTED = ("llama", "granite", "smollm3")
ADDS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
HALVES = {"q4_k": ((0, 2), (2, 4)), "q6_k": ((208, 210),), "q8_0": ((0, 2),), "q4_0": ((0, 2),)}
"""The places of float16 scales in a block."""


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> bytes:
    """A value of metadata with its type."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
    items = [text(one) if isinstance(one, str) else struct.pack("<i", one) for one in value if type(one) is not float]
    items = items or [struct.pack("<f", one) for one in value]
    kind = {str: 8, float: 6}.get(type(value[0]), 5)
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Sequence[int], int, bytes]]) -> None:
    """A file of version 3; tensors are shapes in the order of torch, types and bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + typed(value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def blocks(rows: int, width: int, name: str, random: np.random.Generator) -> np.ndarray:
    """Random blocks [rows, blocks, bytes] with scales that make weights of about 0.1."""
    size, length = FORMATS[name].block_bytes, FORMATS[name].sizes["B"]
    assert size is not None and isinstance(length, int)
    found = random.integers(0, 256, (rows, width // length, size), dtype=np.uint8)
    for start, stop in HALVES[name]:
        top = {"q8_0": 1e-3, "q4_0": 2e-2, "q4_k": 2e-4, "q6_k": 3e-5}[name]
        found[..., start:stop] = random.uniform(top / 2, top, (*found.shape[:2], 1)).astype(np.float16).view(np.uint8)
    return found


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head with the two components of a pair one after the other."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stored_name(name: str, architecture: str) -> str:
    stem, _, end = name.removeprefix("model.").rpartition(".")
    if not stem.startswith("layers."):
        return f"{NAMES[stem]}.{end}"
    _, layer, stem = stem.split(".", 2)
    is_after = stem == "post_attention_layernorm" and architecture in NORMS_AFTER
    return f"blk.{layer}.{'post_attention_norm' if is_after else NAMES[stem]}.{end}"


def metadata_of(folder: Path, architecture: str) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    keys = {
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "context_length": "max_position_embeddings",
        "attention.key_length": "head_dim",
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
        "use_parallel_residual": "use_parallel_residual",
    }
    epsilons = [config[key] for key in ("norm_epsilon", "norm_eps", "layer_norm_eps") if key in config]
    config |= {"layer_norm_epsilon": epsilons[0]} if epsilons else {}
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    config.setdefault("num_experts", config.get("num_local_experts"))
    found = {f"{architecture}.{key}": config[hf] for key, hf in keys.items() if config.get(hf) is not None}
    return {
        "general.architecture": architecture,
        **found,
        f"{architecture}.rope.freq_base": rope["rope_theta"],
        f"{architecture}.rope.dimension_count": int(width * part),
    }


def convert(folder: Path, path: Path, architecture: str, names: Mapping[str, str], **metadata: Any) -> Path:
    """Writes `path` of a checkpoint, with random blocks of the format that `names` has for the end of a name.

    Returns a copy of the checkpoint with the values of the blocks.
    """
    config = json.loads((folder / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    random = np.random.default_rng(0)
    tensors: dict[str, tuple[Sequence[int], int, bytes]] = {}
    plain: dict[str, torch.Tensor] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        format = next((form for end, form in names.items() if name.endswith(end)), None)
        if format is None:
            plain[name], kind = tensor, 30 if tensor.dtype == torch.bfloat16 else 0
            rows = (tensor.view(torch.int16) if kind else tensor).numpy()
        else:
            rows, kind = blocks(*tensor.shape, format, random), int(str(FORMATS[format].when["type"][0]))
            values = VALUES["gguf"][format](torch.from_numpy(rows), K=tensor.shape[1], of=torch.float32)
            plain[name] = values.contiguous()
        if ".experts." in name:
            stem, _, end = name.removeprefix("model.layers.").partition(".mlp.experts.")
            key = f"blk.{stem}.{NAMES['mlp.' + end.split('.')[1]]}_exps.weight"
            stacks.setdefault(key, []).append(rows)
            shape = (len(stacks[key]), *tensor.shape)
            tensors[key] = (shape, kind, np.stack(stacks[key]).tobytes())
            continue
        part = name.split(".")[-2]
        rows = permuted(rows, heads[part]) if architecture in PERMUTED and part in heads else rows
        rows = rows + np.float32(1) if architecture in ADDS_ONE and name.endswith("norm.weight") else rows
        shape = tensor.shape[1:] if part == "shared_expert_gate" else tensor.shape
        tensors[stored_name(name, architecture)] = (shape, kind, np.ascontiguousarray(rows).tobytes())
    write(path, {**metadata_of(folder, architecture), **metadata}, tensors)
    copy = path.parent / "plain"
    copy.mkdir()
    (copy / "config.json").write_text((folder / "config.json").read_text())
    save_file(plain, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
