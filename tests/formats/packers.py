"""Packers of quantised weights, written after the descriptions of the formats: the tensors of a weight, and its value.

Codes, scales and zero points are random; only the weight's shape matters.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
Random = torch.Generator


class Packed(NamedTuple):
    """The stored tensors by the ends of their names, and the weight [N, K] in float64."""

    tensors: dict[str, Tensor]
    value: Tensor


def words(fields: Tensor, width: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words of fields along the last dim; field j of a word is at position order[j]."""
    count = 32 // width
    padded = torch.nn.functional.pad(fields.long(), (0, -fields.shape[-1] % count)).unflatten(-1, (-1, count))
    total = torch.zeros(padded.shape[:-1], dtype=torch.int64)
    for j in range(count):
        total |= padded[..., j] << width * (order[j] if order else j)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def codes(shape: tuple[int, ...], bits: int, random: Random) -> Tensor:
    return torch.randint(0, 2**bits, shape, generator=random)


def scales(shape: tuple[int, ...], random: Random, dtype: torch.dtype) -> Tensor:
    return (torch.rand(shape, generator=random) * 0.02 + 0.002).to(dtype)


def spread(x: Tensor, size: int) -> Tensor:
    """Values of groups [K/G, N] for each of K rows."""
    return torch.stack([x[k // GROUP] for k in range(size)])


def awq(shape: tuple[int, int], random: Random) -> Packed:
    N, K = shape
    q, z = codes((K, N), 4, random), codes((K // GROUP, N), 4, random)
    s = scales((K // GROUP, N), random, torch.float16)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    stored = {"qweight": words(q, 4, order), "qzeros": words(z, 4, order), "scales": s}
    return Packed(stored, ((q - spread(z, K)) * spread(s.double(), K)).T)


def gptq(shape: tuple[int, int], random: Random, *, bits: int = 4, offset: int = 1, shuffled: bool = False) -> Packed:
    N, K = shape
    q, z = codes((K, N), bits, random), codes((K // GROUP, N), bits, random)
    s = scales((K // GROUP, N), random, torch.float16)
    groups = torch.arange(K) // GROUP
    groups = groups[torch.randperm(K, generator=random)] if shuffled else groups
    stored = {
        "qweight": words(q.T, bits).T.contiguous(),
        "qzeros": words((z - offset) % 2**bits, bits),
        "scales": s,
        "g_idx": groups.int(),
    }
    return Packed(stored, ((q - z[groups]) * s.double()[groups]).T)


def packed(shape: tuple[int, int], random: Random, *, bits: int = 4, has_zeros: bool = False) -> Packed:
    N, K = shape
    q, z = codes((K, N), bits, random), torch.full((K // GROUP, N), 2 ** (bits - 1))
    z = codes((K // GROUP, N), bits, random) if has_zeros else z
    s = scales((K // GROUP, N), random, torch.bfloat16)
    stored = {"weight_packed": words(q.T, bits), "weight_scale": s.T.contiguous(), "weight_shape": torch.tensor(shape)}
    stored |= {"weight_zero_point": words(z, bits).T.contiguous()} if has_zeros else {}
    return Packed(stored, ((q - spread(z, K)) * spread(s.double(), K)).T)


def int8(shape: tuple[int, int], random: Random) -> Packed:
    q, s = codes(shape, 8, random) - 128, scales((shape[0], 1), random, torch.bfloat16)
    return Packed({"weight": q.to(torch.int8), "weight_scale": s}, q * s.double())


def fp8(shape: tuple[int, int], random: Random, *, scale: str = "weight_scale_inv", block: int = 16) -> Packed:
    """Blocks of 16 x 16, or with a block of 0 one factor."""
    N, K = shape
    w = torch.randn(shape, generator=random).to(torch.float8_e4m3fn)
    s = scales((-(-N // block), -(-K // block)) if block else (1,), random, torch.float32)
    value = w.double()
    for n in range(N):
        for k in range(K):
            value[n, k] *= s[n // block, k // block] if block else s[0]
    return Packed({"weight": w, scale: s}, value)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4(shape: tuple[int, int], random: Random) -> Packed:
    N, K = shape
    q = codes(shape, 4, random)
    s = (torch.rand((N, K // 16), generator=random) + 0.5).to(torch.float8_e4m3fn)
    divisor = torch.tensor([37.0])
    stored = {
        "weight_packed": (q[:, ::2] | q[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": s,
        "weight_global_scale": divisor,
    }
    signs = torch.where(q >= 8, -1, 1)
    value = torch.empty(shape, dtype=torch.float64)
    for k in range(K):
        value[:, k] = torch.tensor(E2M1)[q[:, k] % 8] * signs[:, k] * (s[:, k // 16].float() / divisor)
    return Packed(stored, value)


def bits4(shape: tuple[int, int], random: Random, *, kind: str = "nf4", is_nested: bool = False) -> Packed:
    """bitsandbytes' weights of 4 bits: flat, in blocks of GROUP, with scales in float32 or in bytes by 256."""
    N, K = shape
    q, table = codes(shape, 4, random), torch.randn(16, generator=random)
    count = N * K // GROUP
    state = {"quant_type": kind, "blocksize": GROUP, "dtype": "float32", "shape": list(shape)}
    absmax = scales((count,), random, torch.float32)
    extra = {}
    if is_nested:
        found = codes((count,), 8, random).to(torch.uint8)
        nested = scales((-(-count // 256),), random, torch.float32)
        values = torch.rand(256, generator=random)
        extra = {"absmax": found, "nested_absmax": nested, "nested_quant_map": values}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = torch.stack([values[int(one)] * nested[i // 256] + 0.25 for i, one in enumerate(found)])
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    flat = q.flatten()
    stored = {"weight": (flat[::2] << 4 | flat[1::2]).to(torch.uint8).view(-1, 1)}
    more = {"absmax": absmax, "quant_map": table, f"quant_state.bitsandbytes__{kind}": text, **extra}
    stored |= {f"weight.{name}": one for name, one in more.items()}
    value = table.double()[flat] * torch.repeat_interleave(absmax.double(), GROUP)
    return Packed(stored, value.view(N, K))


def llm_int8(shape: tuple[int, int], random: Random) -> Packed:
    q, s = codes(shape, 8, random) - 128, scales((shape[0],), random, torch.float32)
    value = (q.to(torch.float32) * s[:, None]) * torch.tensor(1 / 127, dtype=torch.float32)
    stored = {"weight": q.to(torch.int8), "SCB": s, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Packed(stored, value.double())


def mlx(shape: tuple[int, int], random: Random) -> Packed:
    N, K = shape
    q, s = codes(shape, 4, random), scales((N, K // GROUP), random, torch.float16)
    offset = -8 * scales((N, K // GROUP), random, torch.float16)
    value = q * spread(s.double().T, K).T + spread(offset.double().T, K).T
    return Packed({"weight": words(q, 4).view(torch.uint32), "scales": s, "biases": offset}, value)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
       "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_threshold": 6.0,
       "llm_int8_skip_modules": None}  # fmt: skip
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


METHODS: dict[str, tuple[Mapping[str, Any], Callable[..., Packed], dict[str, Any]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, awq, {}),
    "gptq": (GPTQ, gptq, {}),
    "gptq in order of activations": ({**GPTQ, "desc_act": True}, gptq, {"shuffled": True}),
    "gptq_v2, 8 bits": ({**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, gptq, {"bits": 8, "offset": 0}),
    "packed": (compressed("pack-quantized", **INT4), packed, {}),
    "packed with zeros": (
        compressed("pack-quantized", **{**INT4, "symmetric": False}),
        packed,
        {"has_zeros": True},
    ),
    "packed, 8 bits": (compressed("pack-quantized", **{**INT4, "num_bits": 8}), packed, {"bits": 8}),
    "int8": (
        compressed("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel", group_size=None),
        int8,
        {},
    ),
    "fp8 in blocks": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}, fp8, {}),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16, strategy="tensor_group"),
        nvfp4,
        {},
    ),
    "nf4": (NF4, bits4, {}),
    "fp4 with bytes as scales": (
        {**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        bits4,
        {"kind": "fp4", "is_nested": True},
    ),
    "llm.int8": ({**NF4, "load_in_4bit": False, "load_in_8bit": True}, llm_int8, {}),
    "mlx": ({"bits": 4, "group_size": GROUP}, mlx, {}),
    "fp8": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "static"},
        fp8,
        {"scale": "weight_scale", "block": 0},
    ),
}
"""Settings, packer and its arguments by name."""


def quantise(
    source: Path, folder: Path, method: str, *, seed: int = 0, names: tuple[str, ...] = ("proj.weight",)
) -> Path:
    """Copies a checkpoint to `folder / "quantised"` and `folder / "plain"`, which has the values in float32."""
    settings, pack, options = METHODS[method]
    random = torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(names):
            found = pack(tuple(tensor.shape), random, **options)
            stored |= {name.removesuffix("weight") + key: value for key, value in found.tensors.items()}
            plain[name] = found.value.float().contiguous()
        else:
            stored[name] = plain[name] = tensor
    for name, tensors in (("quantised", stored), ("plain", plain)):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    key = "quantization" if method == "mlx" else "quantization_config"
    edit_config(folder / "quantised", **{key: settings})
    return folder / "quantised"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
