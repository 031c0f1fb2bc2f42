"""Checks of the Triton kernels against the references, on the device in SAGELLM_CHECK_DEVICE.

Operands and results are surrounded by NaN, or by an integer that no result has, so that accesses out of bounds are
detected. The references compute in float64, on the CPU.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from sageLLM.generated.kernels.reference import KERNELS as REFERENCES
from sageLLM.generated.kernels.triton import KERNELS
from sageLLM.generated.kernels.triton.linear import _lm_head_sample_merge
from sageLLM.generated.ops import OPS
from sageLLM.generated.tests.cases import CASES, Cases
from sageLLM.generated.tests.op_checks import make_operands

DEVICE = torch.device(os.environ.get("SAGELLM_CHECK_DEVICE", "cpu"))
GUARD = 64
POISON = {"f": float("nan"), "i": -7777777}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OF_TEMPLATES = {"linear", "lm_head", "head_linear", "router_logits", "topk_router", "expert_linear", "expert_down"}
SPECIAL = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-40, 6e4, -6e4]

Results = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one call: the greatest error relative to the tolerance, and "" or another failure."""

    op: str
    kind: str
    dtype: str
    error: float
    wrong: str


class Memory:
    """Replaces torch.empty: a buffer is filled with poison and has guards on both sides."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []
        self.empty = torch.empty

    def allocate(self, *sizes: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        count = prod(shape)
        buffer = torch.full(
            (count + 2 * GUARD,), POISON["f" if dtype.is_floating_point else "i"], dtype=dtype, device=device or DEVICE
        )
        self.buffers.append((buffer, count))
        return buffer[GUARD : GUARD + count].view(shape)

    def placed(self, x: Tensor) -> Tensor:
        """A copy of x between guards, with the strides of x."""
        room = self.allocate(x.stride(0) * x.shape[0] if x.dim() else 1, dtype=x.dtype)
        return room.as_strided(x.shape, x.stride()).copy_(x)

    def why_broken(self) -> str:
        for buffer, count in self.buffers:
            outside = torch.cat((buffer[:GUARD], buffer[GUARD + count :]))
            if not (outside.isnan().all() if outside.is_floating_point() else (outside == POISON["i"]).all()):
                return "a store out of bounds"
        return ""


def call(kernel: Callable[..., Any], operands: list[Any], attrs: Mapping[str, Any]) -> Results:
    results = kernel(*operands, **attrs)
    return results if isinstance(results, tuple) else (results,)


def triton_results(op: str, operands: list[Any], attrs: Mapping[str, Any]) -> tuple[Results, str]:
    """The results of the kernel, and whether it stored out of bounds or changed an operand."""
    memory = Memory()
    placed = [None if x is None else memory.placed(x) if x.numel() else x.to(DEVICE) for x in operands]
    torch.empty = memory.allocate
    try:
        results = call(KERNELS[op], placed, attrs)
    finally:
        torch.empty = memory.empty
    changed = set(OPS[op].inplace.values())
    wrong = memory.why_broken()
    placed = [None if x is None else x.cpu() for x in placed]
    for name, before, after in zip(OPS[op].input_types, operands, placed, strict=False):
        if name not in changed and before is not None and not torch.equal(before.nan_to_num(), after.nan_to_num()):
            wrong = f"changes {name}"
    return tuple(x.cpu() for x in results), wrong


def exact_results(op: str, operands: list[Any], attrs: Mapping[str, Any]) -> Results:
    """The reference in float64 arithmetic, rounded wherever the spec rounds."""
    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith(REFERENCES["add"].__module__.rsplit(".", 1)[0])
    ]
    widths = [(module, module.wide) for module in modules if hasattr(module, "wide")]
    for module, _ in widths:
        module.wide = lambda x: torch.float64
    try:
        return call(REFERENCES[op], [None if x is None else x.clone() for x in operands], attrs)
    finally:
        for module, wide in widths:
            module.wide = wide


def wide_results(op: str, operands: list[Any], attrs: Mapping[str, Any]) -> Results:
    """The reference on float64 operands, for kernels with another order of summation than the library."""
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in operands]
    return call(REFERENCES[op], [None if x is None else x.clone() for x in wide], attrs)


def by_element(found: Tensor, wanted: Tensor) -> float:
    """Error over tolerance: 1e-5 of the element plus the greatest one in float32, 2 ulp in narrow types."""
    target = wanted.to(found.dtype).double()
    bits = {torch.float32: 0, torch.bfloat16: 8, torch.float16: 11}[found.dtype]
    allowed = 1e-5 * (wanted.abs() + wanted.abs().max()) if bits == 0 else 2.0 * ulp(target, bits, found.dtype)
    return float(((found.double() - target).abs() / allowed.clamp(min=1e-300)).nan_to_num(torch.inf).max())


def ulp(x: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    return (
        torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=torch.finfo(dtype).tiny)))) * 2.0 ** (1 - bits)
    ).double()


def by_greatest(found: Tensor, wanted: Tensor, dtype: str) -> float:
    """Error over tolerance for sums: 2 ulp of the greatest element, since both weights and results are rounded."""
    allowed = {"f32": 1e-5, "bf16": 2**-7, "f16": 2**-10}[dtype] * wanted.abs().max().clamp(min=1e-9)
    return float((found.double() - wanted).abs().nan_to_num(torch.inf).max() / allowed)


def compared(
    op: str, kind: str, dtype: str, operands: list[Any], attrs: Mapping[str, Any], *, is_sum: bool = False
) -> Finding:
    """Compares one call of the kernel with the reference; `is_sum` allows any order of summation."""
    try:
        found, wrong = triton_results(op, operands, attrs)
    except Exception as error:  # reported like any other finding, with the cause from the interpreter
        return Finding(op, kind, dtype, 0.0, repr(error.__cause__ or error)[:300])
    wanted = (wide_results if is_sum else exact_results)(op, operands, attrs)
    error = 0.0
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape:
            wrong = f"expected shape {tuple(other.shape)}, got {tuple(one.shape)}"
        elif one.is_floating_point() and one.numel():
            wide = other.double()
            error = max(error, by_greatest(one, wide, dtype) if is_sum else by_element(one, wide))
        elif not torch.equal(one, other):
            wrong = "other integers"
    return Finding(op, kind, dtype, error, wrong)


def special(op: str, operands: list[Any], attrs: Mapping[str, Any], dtype: str) -> Finding:
    """Compares infinities, NaN, zeros and subnormal numbers with the results of torch."""
    for x in operands:
        if x.is_floating_point() and x.numel() >= len(SPECIAL):
            x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL).to(x.dtype)
    found, wrong = triton_results(op, operands, attrs)
    for one, other in zip(found, call(REFERENCES[op], operands, attrs), strict=True):
        if one.is_floating_point() and not torch.allclose(one.double(), other.double(), 2e-2, 1e-5, equal_nan=True):
            wrong = "other special values"
    return Finding(op, "special values", dtype, 0.0, wrong)


def row_findings() -> Iterator[Finding]:
    """Ops from equations: the cases of the spec, strided rows, no rows, rows longer than a tile."""
    for name in KERNELS.keys() & CASES.keys() - OF_TEMPLATES:
        sizes, attrs, limits = CASES[name]
        for kind, case, dtype in row_cases(name, CASES[name]):
            dims = {key: case[key] for key, spec in OPS[name].attr_types.items() if spec.type == "dim"}
            operands = [*make_operands(OPS[name], case, limits, DTYPES[dtype]).values()]
            yield compared(name, kind, dtype, operands, attrs | dims)
            if kind == str(sizes[-1]) and dtype != "f16":
                yield compared(name, "strided rows", dtype, [strided(x) for x in operands], attrs | dims)
                yield special(name, operands, attrs | dims, dtype)


def row_cases(name: str, cases: Cases) -> Iterator[tuple[str, dict[str, Any], str]]:
    yield from ((str(case), case, dtype) for case in cases.sizes for dtype in ("f32", "bf16"))
    last = cases.sizes[-1]
    yield str(last), last, "f16"
    rows = {"R", "T"} & last.keys()
    few = {**last, **dict.fromkeys(rows, 2)}
    if {"H", "I"} & last.keys():
        yield "more than a block", {**few, **dict.fromkeys({"H", "I"} & last.keys(), 1500)}, "bf16"
    if hasattr(sys.modules[KERNELS[name].__module__], f"_{name}_long") and "H" in last:
        yield "longer than a tile", {**few, "H": 16500}, "f32"
    if not rows <= set(cases.limits.values()):
        yield "no rows", {**last, **dict.fromkeys(rows - set(cases.limits.values()), 0)}, "f32"


def strided(x: Tensor) -> Tensor:
    """The same numbers, with a gap between rows."""
    if x.dim() < 2:
        return x
    return torch.nn.functional.pad(x, (0, 3))[..., :-3]


def template_findings() -> Iterator[Finding]:
    yield from attention_findings()
    yield from gemm_findings()
    yield from other_findings()
    yield from query_key_findings()


def attention_findings() -> Iterator[Finding]:
    variants: list[dict[str, Any]] = [{}, {"window": 5}, {"softcap": 3.0}, {"window": 40, "softcap": 2.0}]
    starts = torch.tensor([0, 1, 41, 41, 50], dtype=torch.int32)
    for dtype, attrs in [*(("f32", one) for one in variants), ("bf16", {}), ("f16", {"window": 40})]:
        kind, given = DTYPES[dtype], {"scale": 0.3, **attrs}
        sinks, slopes = torch.randn(6).to(kind), torch.rand(6)
        for extra in ((None, None), (sinks, None), (None, slopes)) if dtype == "f32" else ((sinks, slopes),):
            label = f"{attrs}{' sinks' if extra[0] is not None else ''}{' slopes' if extra[1] is not None else ''}"
            q, *cache = paged([1, 530, 0, 37], kind)
            yield compared("paged_decode_attention", label, dtype, [q[:4], *cache, *extra], given, is_sum=True)
            q, *cache = paged([1, 70, 0, 37], kind)
            yield compared("paged_prefill_attention", label, dtype, [q, *cache, starts, *extra], given, is_sum=True)
        operands = [*(torch.randn(50, heads, 24).to(kind) for heads in (6, 2, 2)), starts]
        for causal in (False, True):
            label = f"{attrs} causal={causal}"
            yield compared("varlen_attention", label, dtype, operands, {"causal": causal, **given}, is_sum=True)


def paged(lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """q for 50 rows of 6 heads, and a cache of 2 heads with blocks in random order; unused slots hold NaN."""
    width = max(1, -(-max(lengths) // 16))
    table = torch.randperm(len(lengths) * width + 3)[: len(lengths) * width].view(len(lengths), width).int()
    k, v = (torch.full((len(lengths) * width + 3, 16, 2, d), torch.nan).to(dtype) for d in (24, 20))
    for b, length in enumerate(lengths):
        for n in range(length):
            k[table[b, n // 16], n % 16] = torch.randn(2, 24).to(dtype)
            v[table[b, n // 16], n % 16] = torch.randn(2, 20).to(dtype)
    return [torch.randn(50, 6, 24).to(dtype), k, v, table, torch.tensor(lengths, dtype=torch.int32)]


def gemm_findings() -> Iterator[Finding]:
    for dtype, M in (("f32", 1), ("f32", 19), ("bf16", 3), ("f16", 32), ("bf16", 40), ("f32", 0)):

        def numbers(*shape: int, kind: torch.dtype = DTYPES[dtype]) -> Tensor:
            return torch.randn(shape).to(kind)

        experts, stacked = torch.randint(0, 5, (M, 3)).int(), numbers(5, 70, 33)
        calls: list[tuple[str, list[Any]]] = [
            ("linear", [numbers(M, 300), numbers(37, 300)]),
            ("lm_head", [numbers(M, 300), numbers(37, 300), numbers(37)]),
            ("linear", [numbers(2, M, 300), numbers(37, 300), numbers(37)]),
            ("router_logits", [numbers(M, 300), numbers(37, 300), None]),
            ("head_linear", [numbers(M, 3, 33), numbers(3, 10, 33)]),
            ("expert_linear", [numbers(M, 33), experts, stacked, numbers(5, 70)]),
            ("expert_down", [numbers(M, 3, 33), experts, stacked, None]),
        ]
        yield from (compared(op, f"M={M}", dtype, operands, {}, is_sum=True) for op, operands in calls)


def other_findings() -> Iterator[Finding]:
    groups = {"scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "top2"}
    for attrs in ({}, groups, {"groups": 3, "top_groups": 2, "renormalize": False, "factor": 2.5}):
        for dtype, bias in (("f32", None), ("bf16", torch.randn(12).bfloat16())):
            logits = torch.randn(9, 12).to(DTYPES[dtype])
            yield compared("topk_router", str(attrs), dtype, [logits, bias], {"A": 4, **attrs}, is_sum=True)
    logits = torch.randn(5, 9000)
    logits[1, 77] = logits[1, 8000] = 50.0
    logits[3] = -torch.inf
    logits[4, 8100] = logits[4, 4500] = torch.nan
    yield compared("sample", "greedy: a tie, nothing finite, NaN", "f32", [logits], {})
    drawn = [torch.tensor([0.0, 1.0, 0.7]), None, torch.tensor([0.9] * 3), None, torch.rand(3)]
    yield compared("sample", "drawn", "f32", [logits[:3], *drawn], {})
    yield from head_and_sample_findings(drawn)
    starts, slots = torch.tensor([0, 1, 4, 9]).int(), torch.tensor([3, 9, 0, 15, 7]).int()
    for dtype, kind in DTYPES.items():
        k, v, *caches = (
            torch.randn(shape).to(kind) for shape in ((5, 3, 20), (5, 3, 12), (4, 4, 3, 20), (4, 4, 3, 12))
        )
        yield compared("kv_store", "", dtype, [k, v, *caches, slots], {})
        rows = torch.randn(9, 20).to(kind)
        yield compared("pool_first", "", dtype, [rows, starts], {})
        yield compared("pool_last", "", dtype, [rows, starts], {})
        yield compared("embedding_shard", "", dtype, [torch.tensor([0, 7, 12, 30]).int(), rows], {"first": 5})


def head_and_sample_findings(drawn: list[Any]) -> Iterator[Finding]:
    """Small integers, so that sums are exact and many logits tie; then more blocks than one iteration of the merge."""
    for dtype, M, V in (("f32", 1, 37), ("bf16", 3, 600), ("f16", 19, 100), ("f32", 40, 70), ("bf16", 0, 70)):
        x, w, bias = (torch.randint(-1, 2, shape).to(DTYPES[dtype]) for shape in ((M, 70), (V, 70), (V,)))
        yield compared("lm_head_sample", f"M={M} V={V}", dtype, [x, w], {}, is_sum=True)
        yield compared("lm_head_sample", f"M={M} V={V} bias", dtype, [x, w, bias], {}, is_sum=True)
        if M == 3:
            yield compared("lm_head_sample", "drawn", dtype, [x, w, None, *drawn], {}, is_sum=True)
    block_max = torch.randint(0, 99, (3, 2500)).float()
    block_max[1], block_max[2, 2100], block_max[2, 2200] = -torch.inf, torch.nan, torch.nan
    tokens, block_argmax = torch.empty(3, dtype=torch.int64, device=DEVICE), 16 * torch.arange(2500).int().repeat(3, 1)
    _lm_head_sample_merge[(3,)](
        block_max.to(DEVICE), block_argmax.to(DEVICE), tokens, 2500, BLOCK_B=1024, enable_fp_fusion=False
    )
    is_right = torch.equal(tokens.cpu(), 16 * block_max.argmax(-1))
    yield Finding("lm_head_sample", "many blocks", "f32", 0.0, "" if is_right else "other tokens")


def query_key_findings() -> Iterator[Finding]:
    """Norm and rotation of heads, and their store to the cache, from one packed projection of 3 + 2 * 1 heads."""
    for dtype, kind in DTYPES.items():
        caches = [torch.randn(4, 4, 1, 12).to(kind) for _ in range(2)]
        pos, slots = torch.tensor([4, 0, 8]).int(), torch.tensor([3, 9, 0]).int()
        rest = [pos, torch.randn(9, 5), torch.randn(9, 5), *caches, slots]
        for op in (
            "qk_rope_kv_store",
            "qk_rope_interleaved_kv_store",
            "qk_norm_rope_kv_store",
            "qk_norm_1p_rope_kv_store",
        ):
            norms = [torch.randn(12).to(kind) for _ in range(2)] if "norm" in op else []
            yield compared(op, "", dtype, [torch.randn(3, 60).to(kind), *norms, *rest], {"Nq": 3, "Nkv": 1, "D": 12})


def batch_invariance_findings() -> Iterator[Finding]:
    """The result of a row or a sequence is the same to the bit with and without others in the batch."""
    for op, operands, attrs in batches():
        operands = [x.to(DEVICE) for x in operands]
        own = [first(x, name) for name, x in zip(OPS[op].input_types, operands, strict=False)]
        is_same = torch.equal(KERNELS[op](*operands, **attrs)[:1], KERNELS[op](*own, **attrs))
        yield Finding(op, "alone", "f32", 0.0, "" if is_same else "other bits than in a batch")


def batches() -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    yield "rms_norm", [torch.randn(20, 100), torch.randn(100)], {}
    yield "linear", [torch.randn(32, 300), torch.randn(37, 300)], {}
    q, *cache = paged([37, 600], torch.float32)
    yield "paged_decode_attention", [q[:2], *cache], {"scale": 0.3}


def first(x: Tensor, name: str) -> Tensor:
    """The operand for the first row or sequence alone; the shared ones unchanged."""
    is_shared = name in ("w", "k_cache", "v_cache")
    return x if is_shared else x[:1, :3] if name == "block_table" else x[:1]


def findings() -> Iterator[Finding]:
    """Every kernel, in new random cases."""
    yield from row_findings()
    yield from template_findings()
    yield from batch_invariance_findings()
