"""Values of formats: bit-equal to the reference libraries, as recorded, and to packers that were written separately."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sageLLM.generated.formats import METHODS
from sageLLM.generated.formats.values import VALUES
from sageLLM.generated.formats.values.algebra import bits, power_of_two
from sageLLM.runtime.core.model.formats import Format
from sageLLM.runtime.loader.dequantize import dequantize
from tests.formats import packers

RECORDED = load_file(Path(__file__).parent / "recorded.safetensors")
COMPRESSED = {
    "packed": ("packed", {"b": 4, "G": 16}),
    "packed_zeros": ("packed_zeros", {"b": 4, "G": 16}),
    "packed_8": ("packed", {"b": 8, "G": 64}),
    "int8": ("int8", {"G": 64}),
    "fp8": ("fp8", {"G": 64}),
    "fp8_tensor": ("fp8_tensor", {}),
}
BLOCKS = {
    "F16": "float16",
    "BF16": "bfloat16",
    **{name: name.lower() for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")},
    **{name: name.lower() for name in ("IQ4_NL", "IQ4_XS", "MXFP4")},
}


def format_of(method: str, name: str) -> Format:
    return next(one for one in METHODS[method].formats if one.name == name)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(name: str) -> None:
    """The library multiplies in the type of the scales, bfloat16, which rounds the exact product once."""
    format, sizes = COMPRESSED[name]
    stored = {key.partition(".")[2]: tensor for key, tensor in RECORDED.items() if key.startswith(f"{name}.")}
    value = stored.pop("value")
    one = format_of("compressed_tensors", format)
    values = VALUES["compressed_tensors"][format]
    found = dequantize(one, values, stored, {"N": 24, "K": 64, **sizes}, value.dtype)
    assert torch.equal(found, value)


@pytest.mark.parametrize("name", BLOCKS)
def test_gguf(name: str) -> None:
    value, raw = RECORDED[f"{name}.value"], RECORDED[f"{name}.blocks"]
    one = format_of("gguf", BLOCKS[name])
    assert one.block_bytes is not None
    blocks = raw.unflatten(1, (-1, one.block_bytes))
    sizes = {"K": value.shape[1]} if name not in ("F16", "BF16") else {}
    assert torch.equal(VALUES["gguf"][BLOCKS[name]](blocks, **sizes, of=torch.float32), value)


@pytest.mark.parametrize("shape", [(48, 64), (8, 32)])
@pytest.mark.parametrize("name", ["awq", "gptq", "gptq in order of activations", "gptq_v2, 8 bits"])
def test_groups_along_the_outputs(name: str, shape: tuple[int, int]) -> None:
    settings, pack, options = packers.METHODS[name]
    packed = pack(shape, torch.Generator().manual_seed(1), **options)
    method = str(settings["quant_method"])
    values = VALUES[method]["gptq_v2" if "v2" in name else method]
    numbers = {"N": shape[0], "K": shape[1], "G": packers.GROUP, "b": 8 if "8" in name else 4}
    used = {key: numbers[key] for key in values.__annotations__ if key in numbers}
    assert torch.equal(values(*packed.tensors.values(), **used), packed.value)


def test_mxfp4() -> None:
    """The experts of gpt-oss, as transformers dequantises them: [E, K, N] from blocks of rows [E, N]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 24, 2, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 24, 2), generator=random, dtype=torch.uint8)
    found = VALUES["mxfp4"]["mxfp4"](blocks, scales, K=64, of=torch.float32)
    assert torch.equal(found.bfloat16(), convert_moe_packed_tensors(blocks, scales))


def test_fp8_in_blocks() -> None:
    """As transformers dequantises it, in float32 and rounded to bfloat16."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed = packers.fp8((48, 64), torch.Generator().manual_seed(6))
    weight, scale = packed.tensors.values()
    for dtype in (torch.float32, torch.bfloat16):
        expected = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype)
        sizes = {"N": 48, "K": 64, "P": 16, "Q": 16}
        found = dequantize(format_of("fp8", "fp8_block"), VALUES["fp8"]["fp8_block"], packed.tensors, sizes, dtype)
        assert torch.equal(found, expected)


def test_values_in_chunks_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks end where words, groups and blocks do."""
    random = torch.Generator().manual_seed(3)
    for name in ("awq", "gptq", "packed with zeros", "fp8 in blocks"):
        settings, pack, options = packers.METHODS[name]
        packed = pack((72, 64), random, **options)
        method = str(settings["quant_method"]).replace("-", "_")
        format = {"packed with zeros": "packed_zeros", "fp8 in blocks": "fp8_block"}.get(name, method)
        sizes = {"N": 72, "K": 64, "G": packers.GROUP, "b": 4, "P": 16, "Q": 16}
        for chunk in (1, 700, 10**6):
            monkeypatch.setattr("sageLLM.runtime.loader.dequantize.CHUNK", chunk)
            found = dequantize(format_of(method, format), VALUES[method][format], packed.tensors, sizes, torch.float64)
            assert torch.equal(found, packed.value.float().double()), (name, chunk)


def test_nvfp4() -> None:
    """Two levels of scales; the second one divides."""
    random = torch.Generator().manual_seed(4)
    packed = torch.randint(0, 256, (5, 16), generator=random, dtype=torch.uint8)
    scale = (torch.rand(5, 2, generator=random) * 100 + 1).to(torch.float8_e4m3fn)
    divisor = torch.tensor([448.0])
    table = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    value = torch.empty(5, 32, dtype=torch.float64)
    for n in range(5):
        for k in range(32):
            code = int(packed[n, k // 2]) >> 4 * (k % 2) & 15
            value[n, k] = (-1.0 if code & 8 else 1.0) * table[code & 7] * (float(scale[n, k // 16]) / 448.0)
    assert torch.equal(VALUES["compressed_tensors"]["nvfp4"](packed, scale, divisor, K=32), value)


def test_fields_of_words() -> None:
    word = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    assert bits(word, 4, 1).tolist() == [list(range(16))]
    assert bits(word, 4, 1, order=[7, 6, 5, 4, 3, 2, 1, 0]).tolist() == [[*range(7, -1, -1), *range(15, 7, -1)]]
    assert bits(word.T, 8, 0)[:, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert bits(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4, 1, run=2).tolist() == [[1, 3, 2, 4]]


def test_powers_of_two() -> None:
    found = power_of_two(torch.tensor([0, 127, 130, 254, 255]), torch.float64).tolist()
    assert found[:4] == [2.0**-127, 1.0, 8.0, 2.0**127] and found[4] != found[4]
