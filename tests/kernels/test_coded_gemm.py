"""GEMMs on weights of small codes: every form and instruction set against float64."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native import NARROW, FreshLibrary, needs_compiler
from torch import Tensor

from sageLLM.generated.kernels import cpu
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, decoded, pack_codes, unpack_codes, words_of
from sageLLM.runtime.kernels.cpu.library import Library, kernel_function
from sageLLM.runtime.kernels.cpu.packing import DTYPE_NAMES, PackedWeight

pytestmark = needs_compiler
KERNELS = [
    ("int8", torch.bfloat16, "", ()),
    ("int4", torch.float16, "", ()),
    ("int4", torch.bfloat16, "", ()),
    ("int6", torch.bfloat16, "", ()),
    ("fp4", torch.bfloat16, "", ()),
    ("fp8", torch.bfloat16, "", ()),
    ("fp8", torch.bfloat16, "avx512_vnni", ()),
    ("fp4", torch.bfloat16, "fp32", ()),
    ("int6", torch.float16, "fp32", ()),
    ("int4", torch.float32, "", NARROW),
    ("fp8", torch.float32, "", NARROW),
]
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [
    (1, 1, 1, ""),
    (17, 31, 31, "zeros"),
    (80, 33, 32, ""),
    (65, 100, 100, "zeros"),
    (48, 96, 16, "zeros"),
    (144, 320, 64, "zeros"),
    (20, 512, 32, "minima"),
    (20, 512, 16, "factors"),
    (33, 96, 16, "divisors"),
    (24, 160, 32, "powers of two"),
    (24, 288, 160, ""),
    (16, 48, 16, "float32"),
]
"""Features, inputs, group, and the kind of zeros and scales."""


def one_kernel(folder: Path, flags: tuple[str, ...] = ()) -> Library:
    """A library with the first kernel of linear.cpp only, which compiles faster."""
    source = (Path(cpu.__file__).parent / "linear.cpp").read_text(encoding="utf-8")
    first, _ = source.split("\n// specs/ops/linear.yaml: lm_head\n")
    (folder / "linear.cpp").write_text(f"{first}\n}}  // namespace sage\n", encoding="utf-8")
    return FreshLibrary(folder, flags, folder)


def random_weight(form: str, features: int, inner: int, group: int, kind: str, dtype: torch.dtype) -> CodedWeight:
    random = torch.Generator().manual_seed(features)
    shape = torch.Size((features, inner))
    codes = torch.randint(0, 2 ** FORMS[form].bits, shape, generator=random)
    if form == "fp8":
        codes[codes % 128 == 127] = 0  # NaN
    if kind == "float32" and form != "fp8":
        codes[:] = 2 ** FORMS[form].bits - 1  # NaN, if they were read as scales
    groups = (features, -(-inner // group))
    scales = ((torch.rand(groups, generator=random) + 0.5) / 32).to(torch.float16 if kind else torch.bfloat16)
    zeros = torch.randint(-8, 8, groups, generator=random, dtype=torch.int8) if kind == "zeros" else None
    weight = CodedWeight(form, shape, group, words_of(codes, FORMS[form]), scales, zeros, dtype)
    if form.startswith("fp"):  # has neither zeros nor minima
        weight, kind = replace(weight, zeros=None), "factors" if kind == "minima" else kind
    small = torch.randint(1, 64, groups, generator=random, dtype=torch.int8)
    factors = (torch.rand(features, groups[1] * group // 256, generator=random) / 512 + 1e-4).half()
    match kind:
        case "factors":
            return replace(weight, scales=small, factors=factors)
        case "minima":
            return replace(weight, scales=small, factors=factors, zeros=small.flip(0), minima=factors.flip(0))
        case "divisors":
            return replace(weight, scales=scales.to(torch.float8_e4m3fn), factors=torch.full((features, 1), 3.7))
        case "float32":
            return replace(weight, scales=scales.float() + 1e-5)
        case "powers of two":
            powers = torch.randint(110, 120, groups, generator=random).to(torch.uint8)
            return replace(weight, scales=powers.view(torch.float8_e8m0fnu))
    return weight


def linear(library: Library, x: Tensor, w: PackedWeight) -> Tensor:
    """The kernel on a poisoned result with a margin, which must stay unchanged."""
    (rows, inner), features = x.shape, w.shape[-2]
    framed = torch.full((rows + 1, features + 5), torch.nan, dtype=x.dtype)
    y = framed[:rows, 2 : 2 + features]
    pointers = [x.data_ptr(), w.data_ptr(), None, y.data_ptr()]
    sizes = [rows, inner, features, x.stride(0), inner, framed.stride(0)]
    function = kernel_function(library.address("linear", DTYPE_NAMES[x.dtype], form=w.native))
    function((ctypes.c_void_p * 4)(*pointers), (ctypes.c_int64 * len(sizes))(*sizes), None)
    assert framed[:, :2].isnan().all() and framed[:, 2 + features :].isnan().all() and framed[rows].isnan().all()
    return y


def bound_of(x: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """One rounding to the element type, and that of 32 elements of x, if these become integers of 15 bits.

    Either half of them are at least 1/16 of the largest, or they become integers of 29 bits.
    """
    sums = x.double().abs() @ weight.abs().T
    found = ROUNDING[x.dtype] * (exact.abs() + torch.finfo(x.dtype).smallest_normal) + 1e-5 * sums
    if x.dtype != torch.float32:
        padding = (0, -x.shape[1] % 32)
        blocks = torch.nn.functional.pad(x.double().abs(), padding).unflatten(1, (-1, 32))
        largest = blocks.amax(-1, keepdim=True)
        has_rest = ((blocks < largest / 16) & (blocks > 0)).sum(-1, keepdim=True) > 16
        error = (largest * torch.where(has_rest, 2.0**-28, 2.0**-14)).expand(blocks.shape).flatten(1)
        found += error @ torch.nn.functional.pad(weight.abs(), padding).T
    return found


@pytest.mark.parametrize(("form", "dtype", "isa", "flags"), KERNELS)
def test_every_form_is_exact_to_rounding(
    form: str,
    dtype: torch.dtype,
    isa: str,
    flags: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAGELLM_CPU_ISA", isa)
    library = one_kernel(tmp_path, flags)
    for features, inner, group, kind in SHAPES:
        weight = random_weight(form, features, inner, group, kind, dtype)
        packed, values = pack_codes(weight, 1), decoded(weight, torch.float64)
        assert torch.equal(decoded(unpack_codes(packed), torch.float64), values), kind
        every = torch.randn(40, inner, generator=torch.Generator().manual_seed(1)).to(dtype)
        every[1] *= torch.logspace(-3, 3, inner)
        every[2, ::32] *= 2000
        whole = linear(library, every, packed)
        exact = every.double() @ values.T
        assert ((whole.double() - exact).abs() <= bound_of(every, values, exact)).all(), kind
        for rows in (1, 2, 3, 5, 17, 30):  # a row depends on nothing but the row
            assert torch.equal(linear(library, every[:rows], packed), whole[:rows])


def test_a_row_that_is_not_finite_stays_so(tmp_path: Path) -> None:
    packed = pack_codes(random_weight("int8", 20, 70, 70, "", torch.bfloat16), 1)
    x = torch.ones(3, 70, dtype=torch.bfloat16)
    x[0, 3], x[2, 69] = torch.inf, torch.nan
    found = linear(one_kernel(tmp_path), x, packed)
    assert not found[0].isfinite().any() and found[1].isfinite().all() and found[2].isnan().all()
