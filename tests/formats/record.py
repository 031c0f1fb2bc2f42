"""Records values of the reference libraries in `recorded.safetensors`, for tests without these libraries.

Run `python tests/formats/record.py` with compressed-tensors 0.20.1, gguf 0.19.0 and llama-cpp-python 0.3.36.
"""

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

FILE = Path(__file__).parent / "recorded.safetensors"
ROWS, COLUMNS = 24, 64
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
SCHEMES = {
    "packed": ("pack-quantized", {**INT4, "symmetric": True}),
    "packed_zeros": ("pack-quantized", {**INT4, "symmetric": False}),
    "packed_8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
}
TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "F16", "BF16", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL",
         "IQ4_XS", "MXFP4")  # fmt: skip
WRITTEN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SCALES = {"Q4_K": (0, 4), "Q6_K": (208, 210), "Q2_K": (80, 84), "Q3_K": (108, 110), "Q5_K": (0, 4), "IQ4_NL": (0, 2),
          "IQ4_XS": (0, 2)}  # fmt: skip
"""The places of float16 scales in blocks that the library cannot make."""


def compressed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight, and the weight that the library makes of them."""
    form, settings = SCHEMES[name]
    args = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    size = {"group": args.group_size, "channel": COLUMNS, "tensor": None}[args.strategy]
    groups = weight.reshape(1, -1) if size is None else weight.reshape(ROWS, -1, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale.reshape(1) if size is None else scale}
    state["weight_zero_point"] = zero.reshape(state["weight_scale"].shape)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = {key: value for key, value in compressor.compress(state, scheme).items() if value is not None}
    value = compressor.decompress(stored, scheme)["weight"]
    return {**{f"{name}.{key}": tensor for key, tensor in stored.items()}, f"{name}.value": value}


def blocks(name: str, weight: np.ndarray, random: np.random.Generator) -> dict[str, torch.Tensor]:
    """The blocks of a weight, or random ones with small scales, and the values that the library makes of them."""
    kind = GGMLQuantizationType[name]
    length, size = GGML_QUANT_SIZES[kind]
    try:
        raw = quantize(weight, kind).view(np.uint8).reshape(weight.shape[0], -1)
    except NotImplementedError:
        raw = random.integers(0, 256, (weight.shape[0], weight.shape[1] // length * size), dtype=np.uint8)
        start, stop = SCALES[name]
        for block in range(weight.shape[1] // length):
            half = random.uniform(-1, 1, (weight.shape[0], (stop - start) // 2)).astype(np.float16)
            raw[:, block * size + start : block * size + stop] = half.view(np.uint8)
    return {f"{name}.blocks": torch.from_numpy(raw), f"{name}.value": torch.from_numpy(dequantize(raw, kind))}


def errors() -> dict[str, torch.Tensor]:
    """Weights with normal and with heavy tails, and the errors with which llama.cpp quantises them to each type.

    Errors are Euclidean norms over that of the weights.
    """
    import ctypes

    import llama_cpp

    library = ctypes.CDLL(f"{llama_cpp.__path__[0]}/lib/libggml-base.so")
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    random = np.random.default_rng(1)
    weights = {
        "normal": random.standard_normal((32, 512)).astype(np.float16),
        "tails": random.standard_t(4, (32, 512)).astype(np.float16),
    }
    found = {f"errors.{name}": torch.from_numpy(one) for name, one in weights.items()}
    for name, half in weights.items():
        weight = np.ascontiguousarray(half.astype(np.float32))
        for kind in WRITTEN:
            number = GGMLQuantizationType[kind]
            length, size = GGML_QUANT_SIZES[number]
            raw = np.zeros((weight.shape[0], weight.shape[1] // length * size), np.uint8)
            library.ggml_quantize_chunk(number, weight.ctypes.data, raw.ctypes.data, 0, *weight.shape, None)
            error = np.linalg.norm(dequantize(raw, number) - weight) / np.linalg.norm(weight)
            found[f"errors.{name}.{kind}"] = torch.tensor(float(error))
    return found


def main() -> None:
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name in SCHEMES:
        found |= compressed(name, torch.randn(ROWS, COLUMNS, generator=generator).bfloat16())
    for name in TYPES:
        found |= blocks(name, random.standard_normal((3, 512)).astype(np.float32), random)
    found |= errors()
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, FILE)


if __name__ == "__main__":
    main()
