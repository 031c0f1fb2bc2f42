"""KV caches of codes: the store, the copies and attention in C++, compared with the references and float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from native import DTYPES, NARROW, FreshLibrary, assert_near, native, needs_compiler
from test_cpu_attention import DECODE, PREFILL, VARIANTS, Batch
from torch import Tensor

from sageLLM.generated.kernels import cpu, reference
from sageLLM.generated.kernels.reference.kv_forms import LARGEST, kv_rows, kv_values
from sageLLM.runtime.core.model.kv_form import SCALE_BYTES
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.kv_codes import TORCH_TYPES

CODES = [pytest.param(dtype, id=form.name) for form, dtype in TORCH_TYPES.items()]
STEPS = {torch.int8: 1 / 127 / 2, torch.uint8: 2**-4}
"""The largest error of a value: of the largest one of its row for int8, of itself for float8."""


class CodedBatch(Batch):
    """The same sequences with keys and values in codes."""

    def __init__(self, codes: torch.dtype, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.k, self.v = (kv_rows(x, torch.empty(0, dtype=codes)) for x in (self.k, self.v))


def stored_bytes(*sizes: int, codes: torch.dtype) -> Tensor:
    *outer, width = sizes
    return torch.zeros((*outer, width + SCALE_BYTES), dtype=codes)


@pytest.mark.parametrize("codes", CODES)
def test_values_are_within_half_a_step(codes: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((50, 3, 40), generator=generator) * torch.logspace(-6, 4, 50).view(-1, 1, 1)
    values = kv_values(kv_rows(x, torch.empty(0, dtype=codes)), torch.float64)
    largest = x.abs().amax(-1, keepdim=True).double()
    # Below 2^-6 of the scale, float8 has steps of 2^-9.
    subnormal = largest / 448 / 2**10
    bound = largest * STEPS[codes] if codes == torch.int8 else torch.maximum(x.abs() * STEPS[codes], subnormal)
    assert bool(((values - x).abs() <= bound * 1.0001).all())
    assert bool((values.abs().amax(-1, keepdim=True) - largest).abs().le(largest * 1e-6).all())


@pytest.mark.parametrize("codes", CODES)
def test_codes_are_the_nearest_ones(codes: torch.dtype) -> None:
    """A row with the largest value as one element has the scale 1, so that the codes are the values rounded."""
    x = torch.cat((torch.linspace(-130, 130, 4001), torch.logspace(-9, 2, 500))).clamp(-127, 127)
    x = torch.cat((x, torch.tensor([LARGEST[codes]])))
    k, cache = x.view(1, 1, -1), [stored_bytes(1, 4, 1, len(x), codes=codes) for _ in range(2)]
    native("kv_store")(k, -k, *cache, torch.tensor([2], dtype=torch.int32))
    for stored, sign in zip(cache, (1, -1), strict=True):
        row = stored[0, 2, 0]
        assert row[:SCALE_BYTES].clone().view(torch.float32).item() == 1
        expected = (sign * x).to(torch.float8_e4m3fn) if codes == torch.uint8 else (sign * x).round().to(codes)
        assert torch.equal(row[SCALE_BYTES:], expected.view(codes))
        assert not stored[0, [0, 1, 3]].any()


@needs_compiler
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stores_have_the_bits_of_the_reference(dtype: torch.dtype, codes: torch.dtype) -> None:
    """Rows of zeros, tiny rows, and rows that are not finite, which read as NaN."""
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn((9, 3, width), generator=generator).to(dtype) for width in (20, 33))
    k[1, 1], k[2, 2], v[5, 0] = 0, k[2, 2] * 1e-6, -0.0
    k[3, 0, 3], v[4, 1, 2] = torch.nan, torch.inf
    slots = torch.randperm(24, generator=generator)[:9].to(torch.int32)
    caches = [[stored_bytes(3, 8, 3, width, codes=codes) for width in (20, 33)] for _ in range(2)]
    for kernel, pair in zip((native("kv_store"), reference.KERNELS["kv_store"]), caches, strict=True):
        kernel(k, v, *pair, slots)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    stored = kv_values(caches[0][0].flatten(0, 1)[slots.long()], torch.float32)
    assert stored[3, 0].isnan().all()
    assert not stored[1, 1].any()
    assert int(stored.isnan().sum()) == 20


@needs_compiler
@pytest.mark.parametrize("codes", CODES)
def test_copies_move_scales_and_codes(codes: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    sources = [
        torch.randint(0, 100, (5, 4, 2, width + SCALE_BYTES), generator=generator).to(codes) for width in (24, 8)
    ]
    moved = torch.tensor([4, 1], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    for sliced in (False, True):
        targets = [torch.zeros((3, 4, 3 if sliced else 2, x.shape[3]), dtype=codes) for x in sources]
        native("kv_copy")(*sources, *(x[:, :, :2] for x in targets), *moved)
        for source, target in zip(sources, targets, strict=True):
            assert torch.equal(target[[0, 2], :, :2], source[[4, 1]])
            assert not target[1].any()
            assert not target[:, :, 2:].any()


@needs_compiler
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_attention(dtype: torch.dtype, codes: torch.dtype, variant: dict[str, Any]) -> None:
    for heads, widths, page in (((6, 2), (20, 20), 16), ((4, 4), (64, 32), 5), ((7, 1), (128, 128), 32)):
        options: dict[str, Any] = {"heads": heads, "widths": widths, "page": page, "dtype": dtype}
        batch = CodedBatch(codes, [1, 17, 64, 0, 131], [1] * 5, **options)
        results = [batch.decode(kernel, **variant) for kernel in (native(DECODE), reference.KERNELS[DECODE])]
        assert_near(*results, batch.decode(reference.KERNELS[DECODE], torch.float64, **variant))
        batch = CodedBatch(codes, [40, 17, 0, 133, 1, 90], [40, 1, 0, 70, 1, 3], **options)
        results = [batch.prefill(kernel, **variant) for kernel in (native(PREFILL), reference.KERNELS[PREFILL])]
        assert_near(*results, batch.prefill(reference.KERNELS[PREFILL], torch.float64, **variant))


@pytest.mark.parametrize("codes", CODES)
def test_the_reference_attends_to_the_decoded_values(codes: torch.dtype) -> None:
    batch = CodedBatch(codes, [33, 70], [33, 2], dtype=torch.float32)
    result = batch.prefill(reference.KERNELS[PREFILL], torch.float64)
    plain = Batch([33, 70], [33, 2], dtype=torch.float64)
    plain.q, plain.k, plain.v = batch.q.double(), kv_values(batch.k, torch.float64), kv_values(batch.v, torch.float64)
    assert torch.equal(result, plain.prefill(reference.KERNELS[PREFILL]))


@needs_compiler
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "fp32", "narrow"])
def test_rows_depend_on_their_keys_alone_on_every_isa(
    isa: str, codes: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode has the bits of a prefill, in chunks too; full pages of full rows are multiplied in place with AMX."""
    monkeypatch.setenv("SAGELLM_CPU_ISA", "fp32" if isa == "narrow" else isa)
    library = FreshLibrary(tmp_path, NARROW if isa == "narrow" else ())
    prefill, decode = (NativeCallable(cpu.KERNELS[op], library, reference.KERNELS[op]) for op in (PREFILL, DECODE))
    for heads, widths, page in (((6, 2), (64, 64), 16), ((2, 2), (24, 128), 12)):
        batch = CodedBatch(codes, [300, 77], [300, 40], heads=heads, widths=widths, page=page, dtype=torch.bfloat16)
        rows = batch.prefill(prefill)
        oracle = batch.prefill(reference.KERNELS[PREFILL], torch.float64)
        assert_near(rows, batch.prefill(reference.KERNELS[PREFILL]), oracle)
        last = batch.q_start[1:] - 1
        batch.q = batch.q[last]
        assert torch.equal(batch.decode(decode), rows[last])
