"""KV caches of codes in Triton kernels: attention over them, and the stores, which have the bits of the references."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from checks import paged, strided
from compare import DEVICE, DTYPES, Finding, call, compared
from torch import Tensor

from sageLLM.generated.kernels.reference.kv_forms import kv_rows
from sageLLM.generated.kernels.triton import KERNELS
from sageLLM.runtime.kernels.kv_codes import TORCH_TYPES

FORMS = {form.name: dtype for form, dtype in TORCH_TYPES.items()}
SPECIAL_ROWS = (0.0, -0.0, torch.nan, torch.inf, 1e-40)
ATTENTION = ({}, {"window": 12, "softcap": 2.0}, {"chunk": 16})


def coded(cache: Tensor, form: str) -> Tensor:
    return kv_rows(cache, torch.empty(0, dtype=FORMS[form]))


def findings(everything: bool) -> Iterator[Finding]:
    yield from attention_findings(everything)
    yield from store_findings()


def attention_findings(everything: bool) -> Iterator[Finding]:
    """Codes are exact in every element type, and unused slots have scales that are NaN."""
    calls = [(form, dtype, attrs) for form in FORMS for dtype in DTYPES for attrs in ATTENTION]
    for form, dtype, attrs in calls if everything else random.sample(calls, 5):
        q, k, v, *rest = paged([37, 0, 600, 18], DTYPES[dtype])
        operands = [q[:4], coded(k, form), coded(v, form), *rest]
        given = {"scale": 0.3, **attrs}
        yield compared("paged_decode_attention", f"{form} {attrs}", dtype, operands, given, is_sum=True)
        q, k, v, *rest = paged([37, 0, 60, 18], DTYPES[dtype])
        operands = [q, coded(k, form), coded(v, form), *rest, torch.tensor([0, 30, 30, 49, 50], dtype=torch.int32)]
        yield compared("paged_prefill_attention", f"{form} {attrs}", dtype, operands, given, is_sum=True)


def store_findings() -> Iterator[Finding]:
    """The rows are those of the elements that the same kernel stores, encoded by the reference."""
    slots = torch.tensor([3, 9, 0, 15, 7]).int()
    for form in FORMS:
        for dtype, kind in DTYPES.items():
            k, v = torch.randn(5, 3, 20), torch.randn(5, 3, 12) * 10.0 ** torch.randint(-9, 4, (5, 3, 1))
            for number, value in enumerate(SPECIAL_ROWS):
                v[number, 1, : 12 if value == 0 else 1] = value
            widths = (20, 12)
            yield stored("kv_store", form, dtype, [strided(k.to(kind)), strided(v.to(kind))], [slots], widths, {}, 3)
            pos = torch.tensor([4, 8, 1, 0, 3]).int()
            tables = [pos, strided(torch.randn(9, 5)), strided(torch.randn(9, 5))]
            qkv, norms = strided(torch.randn(5, 96).to(kind)), [torch.randn(12).to(kind) for _ in range(2)]
            attrs = {"Nq": 4, "Nkv": 2, "D": 12}
            for op in ("qk_rope_kv_store", "qk_rope_interleaved_kv_store"):
                yield stored(op, form, dtype, [qkv, *tables], [slots], (12, 12), attrs, 2)
            for op in ("qk_norm_rope_kv_store", "qk_norm_1p_rope_kv_store"):
                yield stored(op, form, dtype, [qkv, *norms, *tables], [slots], (12, 12), attrs, 2)


def stored(
    op: str,
    form: str,
    dtype: str,
    before: list[Any],
    after: list[Any],
    widths: tuple[int, int],
    attrs: dict[str, Any],
    heads: int,
) -> Finding:
    """One call with caches of elements, and one with caches of codes."""
    elements = [torch.zeros(4, 4, heads, width, dtype=DTYPES[dtype], device=DEVICE) for width in widths]
    codes = [coded(cache, form) for cache in elements]
    for caches in (elements, codes):
        call(KERNELS[op], [*(x.to(DEVICE) for x in before), *caches, *(x.to(DEVICE) for x in after)], attrs)
    is_same = all(same_rows(coded(x, form), y) for x, y in zip(elements, codes, strict=True))
    return Finding(op, f"{form} codes", dtype, 0.0, "" if is_same else "other codes than those of the elements")


def same_rows(wanted: Tensor, found: Tensor) -> bool:
    """Whether bits are equal, but those of a scale that is NaN."""
    is_nan = wanted[..., :4].contiguous().view(torch.float32).isnan()
    both_nan = is_nan & found[..., :4].contiguous().view(torch.float32).isnan()
    is_equal = (wanted == found).all(-1, keepdim=True)
    return bool((is_equal | (both_nan & (wanted[..., 4:] == found[..., 4:]).all(-1, keepdim=True))).all())
