"""Blocks of GGUF files as they are written: the inverse of the values, and the search of scales."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sageLLM.generated.formats import METHODS
from sageLLM.generated.formats.values import VALUES
from sageLLM.runtime.core.model.formats import Format
from sageLLM.runtime.core.model.gguf_recipe import Recipe
from sageLLM.runtime.quantize.blocks import BlockFit

RECORDED = load_file(Path(__file__).parent / "recorded.safetensors")
WRITTEN = {one.name: one for one in METHODS["gguf"].formats if one.written is not None}
SEARCHED = [name for name, one in WRITTEN.items() if one.written is not None and one.written.rule == "least_squares"]
LARGEST = 65504.0


def block_len(format: Format) -> int:
    return int(format.sizes["B"])


def parts_of(format: Format, blocks: Tensor, width: int) -> dict[str, Tensor]:
    """The parts that the stored tensors are made of: codes are relative to a zero."""
    assert format.codes is not None
    found = dict(zip(format.codes.parts, VALUES["gguf"][f"{format.name}_codes"](blocks, K=width), strict=True))
    zero = found.pop("zeros", 0)
    return {**found, "codes": found["codes"].int() - zero}


def fitted(format: Format, values: Tensor) -> dict[str, Tensor] | None:
    assert format.written is not None and format.written.block is not None
    return BlockFit(format.written.block, block_len(format)).parts(values)


def written(format: Format, values: Tensor) -> Tensor:
    """The values of the blocks that are written for `values`."""
    parts = fitted(format, values)
    assert parts is not None
    blocks = VALUES["gguf"][f"{format.name}_stored"](**parts)["blocks"]
    return VALUES["gguf"][format.name](blocks, K=values.shape[1], of=torch.float32)


@pytest.mark.parametrize("name", WRITTEN)
def test_blocks_made_of_their_parts_are_the_blocks(name: str) -> None:
    """Of the blocks of the gguf package, in which every bit is random for types with super-blocks."""
    format, raw = WRITTEN[name], RECORDED[f"{name.upper()}.blocks"]
    assert format.block_bytes is not None
    blocks = raw.unflatten(1, (-1, format.block_bytes))
    parts = parts_of(format, blocks, blocks.shape[1] * block_len(format))
    assert torch.equal(VALUES["gguf"][f"{name}_stored"](**parts)["blocks"], blocks)


@pytest.mark.parametrize("name", WRITTEN)
def test_parts_are_in_their_ranges(name: str) -> None:
    """Random blocks have each integer of a range, and none outside."""
    format = WRITTEN[name]
    assert format.written is not None and format.written.block is not None and format.block_bytes is not None
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (64, 16, format.block_bytes), generator=random, dtype=torch.uint8)
    parts = parts_of(format, blocks, 16 * block_len(format))
    for part, (low, high) in format.written.block.ranges.items():
        assert (int(parts[part].min()), int(parts[part].max())) == (low, high), part
    assert set(parts) == set(format.written.block.parts)


@pytest.mark.parametrize("tails", ["normal", "tails"])
@pytest.mark.parametrize("name", SEARCHED)
def test_errors_beside_those_of_llama_cpp(name: str, tails: str) -> None:
    """Recorded with its own quantiser, without a matrix of importance."""
    weight = RECORDED[f"errors.{tails}"].float()
    error = (written(WRITTEN[name], weight) - weight).norm() / weight.norm()
    assert error <= 1.02 * RECORDED[f"errors.{tails}.{name.upper()}"]


@pytest.mark.parametrize("name", SEARCHED)
@given(seed=st.integers(0, 2**32), spread=st.floats(0.001, 100), shift=st.floats(-3, 3), power=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_errors_are_bounded_by_the_step(name: str, seed: int, spread: float, shift: float, power: int) -> None:
    """The root mean square in a block is at most that of rounding to steps of its range in the least group."""
    format = WRITTEN[name]
    assert format.written is not None and format.written.block is not None
    random = torch.Generator().manual_seed(seed)
    x = spread * (torch.randn(2, 2 * block_len(format), generator=random) + shift)
    error = (written(format, x) - x).reshape(-1, block_len(format))
    low, high = format.written.block.ranges["codes"]
    blocks = x.reshape(-1, block_len(format))
    is_signed = not {"minima", "offsets"} & set(format.written.block.parts)
    extent = 2 * blocks.abs().amax(1) if is_signed else blocks.amax(1).clamp(min=0) - blocks.amin(1).clamp(max=0)
    assert (error.square().mean(1).sqrt() <= 0.5 * extent / (high - low)).all()
    scaled = written(format, x * 2.0**power)
    if spread >= 1:  # factors that are not subnormal have the same digits
        assert torch.equal(scaled, written(format, x) * 2.0**power)


@pytest.mark.parametrize("name", SEARCHED)
def test_degenerate_blocks(name: str) -> None:
    """Zeros and equal numbers are exact in sign and near in value; numbers without a scale in float16 are refused."""
    format = WRITTEN[name]
    zeros = torch.zeros(2, block_len(format))
    assert torch.equal(written(format, zeros), zeros)
    for number in (-3.0, 0.5):
        x = torch.full_like(zeros, number)
        assert torch.allclose(written(format, x), x, rtol=0.04), number
    single = zeros.clone()
    single[0, 3] = -7.0
    assert torch.allclose(written(format, single), single, rtol=1e-2, atol=1e-2)
    for number in (float("nan"), float("inf"), LARGEST**2):
        single[1, 5] = number
        assert fitted(format, single) is None, number


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("sign", [-1, 1])
def test_numbers_whose_squares_overflow_are_refused(name: str, sign: int) -> None:
    """Sums of their squares are infinite, so that no error can be compared."""
    format = WRITTEN[name]
    for size in (1e10, 1e20, 1e37):
        x = sign * size * torch.linspace(0.5, 1, block_len(format)).expand(2, -1)
        assert fitted(format, x) is None, size


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("outlier", [-100.0, 100.0])
def test_groups_next_to_an_outlier_are_not_worse_than_zeros(name: str, outlier: float) -> None:
    """The scale of a small group rounds to 0 next to that of a large one: its numbers are then equal."""
    format = WRITTEN[name]
    assert format.written is not None and format.written.block is not None
    x = 0.01 * torch.randn(64, block_len(format), generator=torch.Generator().manual_seed(0))
    x[:, -1] = outlier
    others = slice(0, block_len(format) - format.written.block.group)
    assert ((written(format, x) - x)[:, others].norm() <= x[:, others].norm()).all()


@pytest.mark.parametrize("name", SEARCHED)
def test_numbers_below_the_least_scale_are_not_worse_than_zeros(name: str) -> None:
    """Factors of super-blocks are below the least float16 there."""
    x = torch.randn(64, block_len(WRITTEN[name]), generator=torch.Generator().manual_seed(0))
    for size in (1e-5, 1e-6, 1e-7, 1e-8):
        assert (written(WRITTEN[name], size * x) - size * x).norm() <= 1.01 * (size * x).norm(), size


def test_recipes_choose_by_name_and_layer() -> None:
    """The layers of llama.cpp's Q4_K_M, and of numbers and shares of the layers."""
    recipes = METHODS["gguf"].recipes
    found = [i for i in range(32) if recipes["q4_k_m"].format_of("ffn_down", i, 32) == "q6_k"]
    assert found == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert recipes["q4_k_m"].format_of("ffn_down_exps", 0, 32) == "q6_k"
    assert recipes["q4_k_m"].format_of("ffn_up", 0, 32) == "q4_k"
    assert [recipes["q3_k_m"].format_of("attn_v", i, 16) for i in (1, 2)] == ["q5_k", "q4_k"]
    assert [recipes["q3_k_m"].format_of("ffn_down", i, 32) for i in (1, 2, 4, 5)] == ["q5_k", "q4_k", "q3_k", "q3_k"]
    assert Recipe("q8_0").format_of("output", 0, 1) == "q8_0" and recipes["q4_k_s"].formats == {"q4_k", "q5_k", "q6_k"}
