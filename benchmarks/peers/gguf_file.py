"""Writes a checkpoint of one of the shapes as the GGUF files that llama.cpp reads, without a vocabulary.

bf16 and f16 are written here; llama.cpp's own quantiser makes q8_0 and q4_0 from bf16, with its choice for tables.
"""

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import safe_open

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}


FORMS = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
QUANTISED = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}


def write_form(folder: Path, form: str) -> None:
    """Writes `FORM.gguf` next to the checkpoint, unless it exists."""
    target = folder / f"{form}.gguf"
    if target.exists():
        return
    partial = target.with_suffix(".partial")
    if form in QUANTISED:
        write_form(folder, "bf16")
        quantise(folder / "bf16.gguf", partial, QUANTISED[form])
    else:
        write_gguf(folder, partial, form)
    partial.rename(target)


def quantise(source: Path, target: Path, kind: gguf.LlamaFileType) -> None:
    """llama.cpp's quantisation of a file."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(kind)
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0, f"llama_model_quantize returned {code}"


def write_gguf(folder: Path, partial: Path, form: str) -> None:
    """Writes the checkpoint with weights of one of FORMS."""
    kind, file_type = FORMS[form]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(partial, config["model_type"])
    _add_sizes(writer, config)
    writer.add_file_type(file_type)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config["model_type"]], config["num_hidden_layers"])
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in list(tensors.keys()):
            _add_tensor(writer, names.get_name(name, (".weight",)), tensors.get_tensor(name), config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, config: dict[str, Any], form: gguf.GGMLQuantizationType
) -> None:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    kind = name.split(".")[-2]  # blk.0.attn_q.weight
    if config["model_type"] == "llama" and kind in heads:
        tensor = _interleaved(tensor, heads[kind])
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), form), raw_dtype=form)


def _interleaved(w_NK: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp turns components 2j and 2j + 1 of a llama head together, the checkpoint j and j + D / 2."""
    halves = w_NK.reshape(num_heads, 2, -1, w_NK.shape[1])
    return halves.transpose(1, 2).reshape(w_NK.shape)
