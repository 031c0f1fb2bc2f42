"""Parts of fused weights with different codes: brought to common ones with the same values, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sageLLM.generated.formats.values import VALUES
from sageLLM.runtime.core.model.formats import Extent, StoredPart
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, decoded
from sageLLM.runtime.loader.codes import _moved, coded
from sageLLM.runtime.loader.common_codes import with_common_codes
from tests.formats.gguf_files import FORMATS

ROWS, WIDTH = 8, 512
SCALES = {
    "q8_0": (0,), "q4_0": (0,), "q5_0": (0,), "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2),
    "q6_k": (208,), "mxfp4": (),
}  # fmt: skip
"""The places of float16 numbers in blocks; all others may be any bytes."""


def random_codes(name: str, seed: int) -> CodedWeight:
    random = np.random.default_rng(seed)
    format = FORMATS[name]
    size, length = format.block_bytes, format.sizes["B"]
    assert size is not None and isinstance(length, int)
    blocks = random.integers(0, 250, (ROWS, WIDTH // length, size), dtype=np.uint8)
    for start in SCALES[name]:
        scales = random.uniform(-2e-4, 2e-4, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., start : start + 2] = scales.view(np.uint8)
    stored = {"blocks": torch.from_numpy(blocks)}
    format = replace(format, tensors=(StoredPart("blocks", "u8", (Extent("N"), Extent("K") / "B")),))
    sizes = {"N": ROWS, "K": WIDTH, "B": length}
    return coded(format, VALUES["gguf"][f"{name}_codes"], stored, sizes, torch.float32)


@pytest.mark.parametrize(
    ("names", "form", "group"),
    [
        (("q4_k", "q4_k", "q6_k"), "int6", 16),  # of Q4_K_M
        (("q5_k", "q5_k", "q6_k"), "int6", 16),  # of Q5_K_M
        (("q3_k", "q3_k", "q5_k"), "int6", 16),  # of Q3_K_M
        (("q2_k", "q2_k", "q3_k"), "int4", 16),  # of Q2_K
        (("q4_k", "q5_k"), "int6", 32),
        (("q4_0", "q8_0"), "int8", 32),
        (("q5_0", "q4_0"), "int6", 32),
        (("q6_k", "q6_k"), "int6", 16),
    ],
)
def test_common_codes_have_the_same_values(names: tuple[str, ...], form: str, group: int) -> None:
    parts = [random_codes(name, seed) for seed, name in enumerate(names)]
    found = with_common_codes(parts)
    assert found is not None
    for one, part in zip(found, parts, strict=True):
        assert (one.form, one.group) == (form, group)
        assert torch.equal(decoded(one), decoded(part))


@pytest.mark.parametrize("names", [("q4_k", "q8_0"), ("mxfp4", "q4_0"), ("q6_k", "q8_0")])
def test_codes_without_common_ones(names: tuple[str, str]) -> None:
    """Scales in float16 next to integers with factors, and values from a table."""
    assert with_common_codes([random_codes(name, 0) for name in names]) is None


def test_one_scale_for_all_inputs_is_repeated() -> None:
    whole = random_codes("q8_0", 0)
    channel = replace(whole, group=WIDTH, scales=whole.scales[:, :1])
    found = with_common_codes([channel, whole])
    assert found is not None and found[0].scales.shape == whole.scales.shape
    assert torch.equal(decoded(found[0]), decoded(channel))


def test_minima_that_would_overflow() -> None:
    """32 times a factor near the largest float16."""
    large = random_codes("q6_k", 0)
    assert large.factors is not None
    large = replace(large, factors=torch.full_like(large.factors, 6e4))
    assert with_common_codes([random_codes("q4_k", 1), large]) is None


@pytest.mark.parametrize(("code", "zero", "moved"), [(0, 128, True), (1, 0, False), (255, 129, True), (0, 129, False)])
def test_codes_of_8_bits_are_moved_to_the_center_unless_they_leave_a_byte(code: int, zero: int, *, moved: bool) -> None:
    """Modulo 256 a sum that leaves the range would return to it."""
    codes = torch.tensor([[code] * 16 + [200] * 16], dtype=torch.uint8)
    parts = _moved(FORMS["int8"], "u8", {"codes": codes, "scales": torch.ones(1, 1), "zeros": zero})
    weight = CodedWeight("int8", torch.Size((1, 32)), 32, parts["words"], parts["scales"], parts["zeros"])
    assert torch.equal(decoded(weight), codes.float() - zero)
    assert bool((parts["zeros"] == 0).all()) is moved
