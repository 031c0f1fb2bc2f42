"""Attention, the paged cache and pooling on the CPU: ops with operands that must be consistent with each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from native import DTYPES, NARROW, FreshLibrary, assert_near, native, needs_compiler
from torch import Tensor

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu.callables import NativeCallable

pytestmark = needs_compiler
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "softcap": {"softcap": 5.0},
    "chunk": {"chunk": 13},
    "chunk_window": {"chunk": 70, "window": 40},
    "window_softcap": {"window": 40, "softcap": 2.0},
    "sinks": {"sinks": True},
    "slopes": {"slopes": True},
}


class Batch:
    """Sequences in a paged cache with NaN in unused slots; the last `new` positions of each are queries."""

    def __init__(
        self,
        lengths: list[int],
        new: list[int],
        *,
        heads: tuple[int, int] = (6, 2),
        widths: tuple[int, int] = (20, 20),
        page: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.new, self.page = lengths, new, page
        pages = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(pages) + 3, generator=generator).tolist()
        self.block_table = torch.full((len(lengths), max([*pages, 1]) + 2), 10**6, dtype=torch.int32)
        self.k = torch.full((len(order), page, heads[1], widths[0]), torch.nan, dtype=dtype)
        self.v = torch.full((len(order), page, heads[1], widths[1]), torch.nan, dtype=dtype)
        for b, length in enumerate(lengths):
            own = [order.pop() for _ in range(pages[b])]
            self.block_table[b, : pages[b]] = torch.tensor(own, dtype=torch.int32)
            for cache, width in ((self.k, widths[0]), (self.v, widths[1])):
                rows = torch.randn(length, heads[1], width, generator=generator).to(dtype)
                for n in range(length):
                    cache[own[n // page], n % page] = rows[n]
        self.q = torch.randn(sum(new), heads[0], widths[0], generator=generator).to(dtype)
        self.sinks = torch.randn(heads[0], generator=generator).to(dtype)
        self.slopes = torch.rand(heads[0], generator=generator)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.q_start = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)

    def prefill(self, kernel: Any, dtype: torch.dtype | None = None, **variant: Any) -> Tensor:
        return self._run(kernel, (self.q_start,), dtype, variant)

    def decode(self, kernel: Any, dtype: torch.dtype | None = None, **variant: Any) -> Tensor:
        return self._run(kernel, (), dtype, variant)

    def _run(self, kernel: Any, starts: tuple[Tensor, ...], dtype: torch.dtype | None, variant: Any) -> Tensor:
        dtype, attrs = dtype or self.q.dtype, dict(variant)
        wide = dtype if dtype == torch.float64 else torch.float32
        sinks = self.sinks.to(dtype) if attrs.pop("sinks", False) else None
        slopes = self.slopes.to(wide) if attrs.pop("slopes", False) else None
        is_reference = kernel in reference.KERNELS.values()  # which reads whole rows of the table
        table = self.block_table.clamp(max=len(self.k) - 1) if is_reference else self.block_table
        k, v = (cache.to(dtype) if cache.is_floating_point() else cache for cache in (self.k, self.v))
        operands = self.q.to(dtype), k, v, table, self.seq_lens, *starts, sinks, slopes
        result: Tensor = kernel(*operands, scale=self.q.shape[2] ** -0.5, **attrs)
        return result


DECODE, PREFILL = "paged_decode_attention", "paged_prefill_attention"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_decode(dtype: torch.dtype, variant: dict[str, Any]) -> None:
    for heads, widths, page in (
        ((6, 2), (20, 20), 16),
        ((4, 4), (64, 32), 5),
        ((7, 1), (128, 128), 32),
        ((1, 1), (1, 3), 1),
    ):
        batch = Batch([1, 17, 64, 0, 131], [1] * 5, heads=heads, widths=widths, page=page, dtype=dtype)
        results = [batch.decode(k, **variant) for k in (native(DECODE), reference.KERNELS[DECODE])]
        assert_near(*results, batch.decode(reference.KERNELS[DECODE], torch.float64, **variant))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_prefill_with_decodes_among_the_prompts(dtype: torch.dtype, variant: dict[str, Any]) -> None:
    for heads, widths, page in (((6, 2), (20, 20), 16), ((4, 4), (64, 32), 5), ((9, 1), (16, 16), 8)):
        batch = Batch([40, 17, 0, 133, 1, 90], [40, 1, 0, 70, 1, 3], heads=heads, widths=widths, page=page, dtype=dtype)
        results = [batch.prefill(k, **variant) for k in (native(PREFILL), reference.KERNELS[PREFILL])]
        assert_near(*results, batch.prefill(reference.KERNELS[PREFILL], torch.float64, **variant))


def test_contexts_longer_than_a_part() -> None:
    for new in ([1, 1], [130, 2]):
        batch = Batch([2100, 1024], new, heads=(2, 1), widths=(16, 16))
        oracle = batch.prefill(reference.KERNELS[PREFILL], torch.float64)
        assert_near(batch.prefill(native(PREFILL)), oracle, oracle)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_chunks_neighbours_or_threads(dtype: torch.dtype, variant: dict[str, Any]) -> None:
    whole = Batch([1500], [1500], heads=(6, 2), widths=(24, 24), dtype=dtype)
    rows = whole.prefill(native(PREFILL), **variant)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for first, stop in ((1499, 1500), (700, 1200), (0, 10)):
            part = Batch([1500], [1500], heads=(6, 2), widths=(24, 24), dtype=dtype)
            part.q, part.lengths, part.new = whole.q[first:stop], [stop], [stop - first]
            part.seq_lens = torch.tensor([stop], dtype=torch.int32)
            part.q_start = torch.tensor([0, stop - first], dtype=torch.int32)
            assert torch.equal(part.prefill(native(PREFILL), **variant), rows[first:stop])
            if stop - first == 1:
                assert torch.equal(part.decode(native(DECODE), **variant), rows[first:stop])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "fp32", "narrow"])
def test_every_isa(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full pages of full rows are multiplied in place, others are packed; a decode has the same bits as a prefill."""
    monkeypatch.setenv("SAGELLM_CPU_ISA", "fp32" if isa == "narrow" else isa)
    library = FreshLibrary(tmp_path, NARROW if isa == "narrow" else ())
    prefill, decode = (NativeCallable(cpu.KERNELS[op], library, reference.KERNELS[op]) for op in (PREFILL, DECODE))
    for heads, widths, page in (((6, 2), (64, 64), 16), ((6, 2), (64, 40), 12), ((2, 2), (24, 128), 64)):
        batch = Batch([300, 77], [300, 40], heads=heads, widths=widths, page=page, dtype=torch.bfloat16)
        rows = batch.prefill(prefill)
        assert_near(
            rows, batch.prefill(reference.KERNELS[PREFILL]), batch.prefill(reference.KERNELS[PREFILL], torch.float64)
        )
        last = batch.q_start[1:] - 1
        batch.q = batch.q[last]
        assert torch.equal(batch.decode(decode), rows[last])


def test_no_sequences() -> None:
    batch = Batch([], [])
    assert batch.decode(native(DECODE)).shape == batch.prefill(native(PREFILL)).shape == (0, 6, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "attrs", [{}, {"causal": True}, {"window": 9}, {"causal": True, "window": 5, "softcap": 3.0}], ids=str
)
def test_attention_without_a_cache(dtype: torch.dtype, attrs: dict[str, Any]) -> None:
    q_start = torch.tensor([0, 1, 70, 70, 202], dtype=torch.int32)
    q, k, v = (torch.randn(202, heads, 20).to(dtype) for heads in (4, 2, 2))
    kernels = native("varlen_attention"), reference.KERNELS["varlen_attention"]
    results = [kernel(q, k, v, q_start, scale=0.3, **attrs) for kernel in kernels]
    oracle = kernels[1](q.double(), k.double(), v.double(), q_start, scale=0.3, **attrs)
    assert isinstance(oracle, Tensor)
    assert_near(*results, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_storing_keys_and_values(dtype: torch.dtype) -> None:
    k, v = torch.randn(5, 3, 10).to(dtype), torch.randn(5, 3, 7).to(dtype)
    slots = torch.tensor([11, 0, 7, 3, 8], dtype=torch.int32)
    caches = [torch.randn(4, 4, 3, width).to(dtype) for width in (10, 7)]
    mine, theirs = ([cache.clone() for cache in caches] for _ in range(2))
    results = native("kv_store")(k, v, *mine, slots)
    reference.KERNELS["kv_store"](k, v, *theirs, slots)
    for result, cache, expected in zip(results, mine, theirs, strict=True):
        assert result is cache and torch.equal(cache, expected)


def test_copying_blocks() -> None:
    source = [torch.randn(6, 4, 2, width) for width in (10, 7)]
    caches = [torch.randn(5, 4, 2, width) for width in (10, 7)]
    mine, theirs = ([cache.clone() for cache in caches] for _ in range(2))
    blocks = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([5, 0, 2], [1, 4, 0])]
    native("kv_copy")(*source, *mine, *blocks)
    reference.KERNELS["kv_copy"](*source, *theirs, *blocks)
    for cache, expected in zip(mine, theirs, strict=True):
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["pool_first", "pool_last", "pool_mean"])
def test_pooling(op: str, dtype: torch.dtype) -> None:
    x, q_start = torch.randn(12, 37).to(dtype), torch.tensor([0, 1, 9, 12], dtype=torch.int32)
    oracle = reference.KERNELS[op](x.double(), q_start)
    narrow = reference.KERNELS[op](x, q_start)
    assert isinstance(oracle, Tensor) and isinstance(narrow, Tensor)
    assert_near(native(op)(x, q_start), narrow, oracle)


FUSED = [
    "qk_rope_kv_store",
    "qk_rope_interleaved_kv_store",
    "qk_norm_rope_kv_store",
    "qk_norm_1p_rope_kv_store",
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", FUSED)
def test_queries_and_keys_in_one_pass(op: str, dtype: torch.dtype) -> None:
    """Whole heads are rotated, and parts of heads; the outputs are the memory of the caches."""
    for heads, width, rotated in (((4, 2), 20, 20), ((3, 1), 64, 16), ((2, 2), 2, 2)):
        qkv = torch.randn(7, (heads[0] + 2 * heads[1]) * width).to(dtype)
        norms = [torch.randn(width).to(dtype) for _ in range(2)] if "norm" in op else []
        tables = [torch.randn(30, rotated // 2) for _ in range(2)]
        pos, slots = (torch.randperm(24)[:7].to(torch.int32) for _ in range(2))
        attrs = {"Nq": heads[0], "Nkv": heads[1], "D": width}
        results = []
        for kernel, wide in ((native(op), False), (reference.KERNELS[op], False), (reference.KERNELS[op], True)):
            floats = [x.double() if wide else x for x in (qkv, *norms)]
            wide_tables = [x.double() if wide else x for x in tables]
            caches = [torch.ones(6, 4, heads[1], width, dtype=floats[0].dtype) for _ in range(2)]
            outputs = kernel(*floats, pos, *wide_tables, *caches, slots, **attrs)
            assert wide or all(output is cache for output, cache in zip(outputs[1:], caches, strict=True))
            results.append(outputs)
        for result, narrow, oracle in zip(*results, strict=True):
            assert_near(result, narrow, oracle, ulps=2)
