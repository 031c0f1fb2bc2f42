"""Cases of the Triton kernels: every kernel is compared with its reference, on random operands.

`findings(everything=True)` runs all combinations of options, sizes and element types. Without it a random sample is
drawn that still runs every kernel, every variant (looped rows, blocks of columns, splits) and every pair of options.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch
import triton
from compare import DEVICE, DTYPES, Finding, by_greatest, call, compared, special, wide_results
from torch import Tensor

from sageLLM.generated import ops
from sageLLM.generated.kernels.triton import KERNELS, heads, targets
from sageLLM.generated.kernels.triton.linear import _lm_head_sample_merge
from sageLLM.generated.kernels.triton.sampling import _sample_merge
from sageLLM.generated.kernels.triton.tiles import Tile
from sageLLM.generated.ops import OPS
from sageLLM.generated.tests.cases import CASES
from sageLLM.generated.tests.op_checks import make_operands
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.executor.planner import TorchPlanner
from sageLLM.runtime.kernels.coded_tensor import CodedTensor, coded_tensor
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight, words_of

OF_TEMPLATES = {"linear", "lm_head", "lm_head_sample", "head_linear", "router_logits", "topk_router"}
OF_TEMPLATES |= {"expert_linear", "expert_down"}
PROLOGUES = {"rms_norm_linear", "add_rms_norm_linear", "add_rms_norm_linear_silu_mul"}
GATED = {"linear_silu_mul", "linear_gelu_mul", "linear_gelu_tanh_mul"}
EPILOGUES = GATED | {"linear_gelu", "linear_gelu_tanh", "linear_add", "lm_head_scale", "lm_head_soft_cap"}


def findings(everything: bool = True) -> Iterator[Finding]:
    yield from row_findings(everything)
    yield from attention_findings(everything)
    yield from latent_findings(everything)
    yield from fallback_findings()
    yield from gemm_findings(everything)
    yield from coded_findings(everything)
    yield from router_findings(everything)
    yield from sample_findings()
    yield from head_and_sample_findings(everything)
    yield from merge_findings()
    yield from cache_and_pool_findings()
    yield from query_key_findings(everything)
    yield from batch_invariance_findings()


def row_findings(everything: bool) -> Iterator[Finding]:
    """Ops from equations."""
    for name in sorted(KERNELS.keys() & CASES.keys() - OF_TEMPLATES - EPILOGUES - PROLOGUES):
        for kind, sizes, dtype in row_runs(name, everything):
            yield row_finding(name, kind, sizes, dtype)


def row_runs(name: str, everything: bool) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Kind, sizes and element type: the cases of the spec, and variants of the last one."""
    *others, last = CASES[name].sizes
    rows, columns = {"R", "T"} & last.keys(), {"H", "I"} & last.keys()
    few = {**last, **dict.fromkeys(rows, 2)}
    for dtype in ("f32", "bf16") if everything else random.sample(("f32", "bf16"), 1):
        yield from (("a case of the spec", case, dtype) for case in others)
        yield "special values", last, dtype
    for dtype in ("f32", "bf16", "f16") if everything else () if columns else ("bf16",):
        yield "a case of the spec", last, dtype
    for dtype in ("f32", "bf16") if everything else ("f32",):
        yield "strided rows", last, dtype
    if columns:
        yield "more than a block", {**few, **dict.fromkeys(columns, 2500)}, "bf16"
    if is_looped(name):
        long = {**few, **dict.fromkeys({"H", "D"} & last.keys(), 65)}  # a block of 64 columns, and one of 1
        yield from (("looped rows", long, dtype) for dtype in ("f32", "bf16"))
    if is_looped(name) and "H" in last and (everything or name == "rms_norm"):
        yield "longer than a tile", {**few, "H": 16500}, "f32"
    if not rows <= set(CASES[name].limits.values()):
        yield "no rows", {**last, **dict.fromkeys(rows - set(CASES[name].limits.values()), 0)}, "f32"


def row_finding(name: str, kind: str, sizes: Mapping[str, Any], dtype: str) -> Finding:
    _, attrs, limits = CASES[name]
    # A factor of 1 hides mistakes.
    attrs = {key: 0.7 if isinstance(value, float) and value == 1.0 else value for key, value in attrs.items()}
    attrs |= {key: sizes[key] for key, spec in OPS[name].attr_types.items() if spec.type == "dim"}
    operands = [*make_operands(OPS[name], sizes, limits, DTYPES[dtype]).values()]
    if kind == "special values":
        return special(name, operands, attrs, dtype)
    if kind == "strided rows":
        operands = [strided(x) for x in operands]
    with looped_rows(name) if kind == "looped rows" else nullcontext():
        return compared(name, f"{kind} {sizes}", dtype, operands, attrs)


def is_looped(name: str) -> bool:
    return hasattr(sys.modules[KERNELS[name].__module__], f"_{name}_long")


@contextmanager
def looped_rows(name: str) -> Iterator[None]:
    """Makes the op's rows longer than a tile, which is read in two blocks."""
    module = sys.modules[KERNELS[name].__module__]
    original = module.row_tile
    module.row_tile = lambda columns: Tile(1, max(1, triton.next_power_of_2(columns) // 2), 4, is_looped=True)
    try:
        yield
    finally:
        module.row_tile = original


def strided(x: Tensor) -> Tensor:
    """The same numbers, with a gap between rows."""
    if x.dim() < 2:
        return x
    return torch.nn.functional.pad(x, (0, 3))[..., :-3]


def covering(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A few random combinations in which every pair of values of two factors occurs: the fewest of several choices."""
    pairs = [(one, set(combinations(one.items(), 2))) for one in all_of(factors)]
    return min((greedy_cover(random.sample(pairs, len(pairs))) for _ in range(20)), key=len)


def greedy_cover(candidates: list[tuple[dict[str, Any], set[Any]]]) -> list[dict[str, Any]]:
    """Always takes the candidate with the most elements that are missing."""
    found, missing = [], set().union(*(elements for _, elements in candidates))
    while missing:
        one, elements = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        found.append(one)
        missing -= elements
    return found


def all_of(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]


ATTENTION = {"window": (None, 5, 40), "softcap": (None, 3.0)}
PAGED = {**ATTENTION, "chunk": (None, 9), "sinks": (False, True), "slopes": (False, True)}
DECODE = {**PAGED, "longest": (50, 530)}  # one split of the keys, and two
VARLEN = {**ATTENTION, "causal": (False, True)}


def attention_findings(everything: bool) -> Iterator[Finding]:
    """Options in float32; one combination of them in each narrow type."""
    starts = torch.tensor([0, 1, 41, 41, 50], dtype=torch.int32)
    for dtype, one in with_dtypes(DECODE, everything):
        q, *operands = paged([1, one["longest"], 0, 37], DTYPES[dtype])
        yield attention("paged_decode_attention", dtype, one, [q[:4], *operands])
    for dtype, one in with_dtypes(PAGED, everything):
        operands = [*paged([1, 70, 0, 37], DTYPES[dtype]), starts]
        yield attention("paged_prefill_attention", dtype, one, operands)
    for dtype, one in with_dtypes(VARLEN, everything):
        q, k, v = (torch.randn(50, heads, 24).to(DTYPES[dtype]) for heads in (6, 2, 2))
        operands = [strided(q), strided(k), v, starts]
        yield attention("varlen_attention", dtype, one, operands)


def latent_findings(everything: bool) -> Iterator[Finding]:
    """Latent attention: values are a part of the keys, and the many heads of the one key head are several tiles."""
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)
    for dtype in DTYPES if everything else random.sample([*DTYPES], 1):
        q, k, _, table, lengths = paged([300, 20], DTYPES[dtype], heads=(70, 1))
        operands = [k, k[..., :16], table, lengths]
        yield compared("paged_decode_attention", "latent", dtype, [q[:2], *operands], {"scale": 0.3}, is_sum=True)
        with other_target("gfx942"):  # which merges parts in a second launch
            found = compared("paged_decode_attention", "merged", dtype, [q[:2], *operands], {"scale": 0.3}, is_sum=True)
        yield found
        more = [q[:4], *operands, starts, torch.randn(70).to(DTYPES[dtype])]
        for target in ("sm_90", "gfx942"):
            with other_target(target):
                found = compared("paged_prefill_attention", "latent", dtype, more, {"scale": 0.3}, is_sum=True)
            yield found


@contextmanager
def other_target(name: str) -> Iterator[None]:
    """Configurations of a target other than the interpreter's."""
    originals = targets.current_target, heads.current_target
    targets.current_target = heads.current_target = lambda: name
    try:
        yield
    finally:
        targets.current_target, heads.current_target = originals


def fallback_findings() -> Iterator[Finding]:
    """Sizes without a configuration run the reference, which the statistics of a plan announce."""
    g = GraphWriter("wide", level="kernel", stage=None, dtype="f32")
    q, *caches = (g.input(name, "f32", *shape) for name, shape in WIDE.items())
    table, lengths = g.input("table", "i32", 2, 3), g.input("lengths", "i32", 2)
    graph = g.finish([ops.paged_decode_attention(g, q, *caches, table, lengths)])
    planner = TorchPlanner(KERNELS, "triton")
    planner.plan(graph, {})
    [(_, reason)] = planner.stats[0].in_python.values()
    yield Finding("paged_decode_attention", "announced", "f32", 0.0, "" if "runs its reference" in reason else reason)
    tensors = [torch.randn(shape) for shape in WIDE.values()]
    operands = [*tensors, torch.tensor([[3, 0, 2], [1, 4, 5]]).int(), torch.tensor([40, 17]).int()]
    yield compared("paged_decode_attention", "fallback", "f32", operands, {"scale": 0.1}, is_sum=True)


WIDE = {"q": (2, 2, 256), "k": (6, 16, 1, 256), "v": (6, 16, 1, 256)}


def with_dtypes(factors: Mapping[str, Sequence[Any]], everything: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for dtype in DTYPES:
        chosen = all_of(factors)
        if not everything:
            chosen = covering(factors) if dtype == "f32" else random.sample(chosen, 1)
        yield from ((dtype, one) for one in chosen)


def attention(op: str, dtype: str, one: dict[str, Any], operands: list[Any]) -> Finding:
    if "sinks" in one:
        operands.append(torch.randn(6).to(DTYPES[dtype]) if one["sinks"] else None)
        operands.append(torch.rand(6) if one["slopes"] else None)
    attrs = {key: value for key, value in one.items() if key in ("window", "softcap", "causal", "chunk")}
    return compared(op, str(one), dtype, operands, {"scale": 0.3, **attrs}, is_sum=True)


def paged(lengths: list[int], dtype: torch.dtype, heads: tuple[int, int] = (6, 2)) -> list[Tensor]:
    """q for 50 rows, and a cache of 2 key heads with blocks in random order; unused slots hold NaN."""
    num_heads, num_kv_heads = heads
    width = max(1, -(-max(lengths) // 16))
    table = torch.randperm(len(lengths) * width + 3)[: len(lengths) * width].view(len(lengths), width).int()
    k, v = (torch.full((len(lengths) * width + 3, 16, num_kv_heads, d), torch.nan).to(dtype) for d in (24, 20))
    for b, length in enumerate(lengths):
        for n in range(length):
            k[table[b, n // 16], n % 16] = torch.randn(num_kv_heads, 24).to(dtype)
            v[table[b, n // 16], n % 16] = torch.randn(num_kv_heads, 20).to(dtype)
    return [torch.randn(50, num_heads, 24).to(dtype), k, v, table, torch.tensor(lengths, dtype=torch.int32)]


def gemm_findings(everything: bool) -> Iterator[Finding]:
    """Rows that fill a tile or not, and none; blocks of K that are full or not; more than 32 rows use the reference."""
    some = [("f32", 19, 300), ("bf16", 3, 512), ("f16", 32, 300), ("f32", 0, 300)]
    for dtype, M, K in [*some, ("f32", 1, 300), ("bf16", 40, 300), ("f16", 60, 100)] if everything else some:

        def numbers(*shape: int, kind: torch.dtype = DTYPES[dtype]) -> Tensor:
            return strided(torch.randn(shape).to(kind))

        num_experts = 2 if M == 32 else 5  # 2 experts have more than 32 rows each, and larger tiles
        experts = torch.randint(0, num_experts + 1, (M, 3)).int()  # the last number is that of other ranks' experts
        stacked = numbers(num_experts, 70, 100)
        calls: list[tuple[str, list[Any]]] = [
            ("linear", [numbers(M, K), numbers(37, K)]),
            ("lm_head", [numbers(M, K), numbers(37, K), numbers(37)]),
            ("linear", [numbers(2, M, K), numbers(37, K), numbers(37)]),
            ("router_logits", [numbers(M, K), numbers(37, K), numbers(37) if dtype == "f32" else None]),
            ("head_linear", [numbers(M, 3, 33), numbers(3, 10, 33)]),
            ("expert_linear", [numbers(M, 100), experts, stacked, numbers(num_experts, 70)]),
            ("expert_down", [numbers(M, 3, 100), experts, stacked, None]),
        ]
        yield from (compared(op, f"M={M}", dtype, operands, {}, is_sum=True) for op, operands in calls)
        for op in sorted(EPILOGUES):
            w = numbers(38, K) * (K**-0.5 if op in GATED else 1)  # of products of large numbers, sums lose digits
            more = [numbers(M, 38)] if op == "linear_add" else []
            attrs = {"lm_head_scale": {"factor": 0.7}, "lm_head_soft_cap": {"cap": 30.0}}.get(op, {})
            operands = [numbers(M, K), w, *more, numbers(38) if dtype != "bf16" else None]
            found = compared(op, f"M={M}", dtype, operands, attrs, is_sum=True)
            yield replace(found, error=found.error / 2)  # gates round four times
        for op in sorted(PROLOGUES):
            residual = [numbers(M, K)] if "residual" in OPS[op].input_types else []
            norm_w, bias = (None, numbers(38)) if dtype == "f32" else (numbers(K), None)
            operands = [numbers(M, K), *residual, numbers(38, K) * K**-0.5, norm_w, bias]
            found = compared(op, f"M={M}", dtype, operands, {"eps": 0.3}, is_sum=True)
            yield replace(found, error=found.error / 2)  # the sum, the norm and gates are rounded


def coded_findings(everything: bool) -> Iterator[Finding]:
    """Weights of codes of every form in every kernel that reads them, against floats of the same values."""
    kernels = {"linear", "linear_silu_mul", "add_rms_norm_linear", "lm_head_sample", "expert_linear", "head_linear"}
    calls = list(product(CODES, sorted(kernels), ("f32", "bf16")))
    some = [one for number, one in enumerate(random.sample(calls, len(calls))) if number % 5 == 0]
    for (form, group, has_zeros, has_minima), op, dtype in calls if everything else some:
        inner, kind = 3 * (group or 32), DTYPES[dtype]
        w = coded_tensor(coded_weight(form, WEIGHTS.get(op, (38, inner)), group, kind, has_zeros, has_minima), DEVICE)
        inner = w.shape[-1]
        x = torch.randn(5, 3, inner) if op == "head_linear" else torch.randn(5, inner)
        more = [torch.randn(5, inner)] if op == "add_rms_norm_linear" else []
        more = [torch.tensor([[0, 3], [2, 1], [4, 0], [1, 1], [3, 2]]).int()] if op == "expert_linear" else more
        operands = [x.to(kind), *(one.to(kind) if one.is_floating_point() else one for one in more)]
        yield coded(op, f"{form} by {group} {has_zeros} {has_minima}", dtype, operands, w)


CODES = [
    ("int8", 0, False, False),
    ("int8", 32, True, False),
    ("int6", 16, False, False),
    ("int4", 32, True, False),
    ("int4", 64, False, False),
    ("int4", 32, False, True),
    ("fp4", 32, False, False),
    ("fp8", 64, False, False),
]
"""The form, the inputs of a group (0 for all), whether there are zeros, or minima."""
WEIGHTS = {"expert_linear": (4, 38, 96), "head_linear": (3, 38, 96)}


def coded_weight(
    form: str, shape: tuple[int, ...], group: int, kind: torch.dtype, has_zeros: bool, has_minima: bool
) -> CodedWeight:
    """Random codes and scales; scales of minima have factors."""
    *rows, inner = shape
    group = group or inner
    scales = (*rows, -(-inner // group))
    codes = torch.randint(0, 2 ** FORMS[form].bits, shape, dtype=torch.uint8)
    if form == "fp8":
        codes = torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8)
    made: dict[str, Tensor] = {"scales": (torch.rand(scales) * inner**-0.5).to(torch.float16)}
    if has_zeros:
        made["zeros"] = torch.randint(-5, 6, scales, dtype=torch.int8)
    if has_minima:
        made = {name: torch.randint(1, 64, scales, dtype=torch.int8) for name in ("scales", "zeros")}
        made |= {name: torch.rand(*rows, 1).half() * inner**-0.5 for name in ("factors", "minima")}
    words = words_of(codes, FORMS[form])
    return CodedWeight(form, torch.Size(shape), group, words, dtype=kind, **made)


def coded(op: str, kind: str, dtype: str, operands: list[Any], w: CodedTensor) -> Finding:
    """The kernel on codes against the reference on their values, in float64."""
    attrs = {"eps": 0.3} if "norm" in op else {}
    found = call(KERNELS[op], [*(one.to(DEVICE) for one in operands), w], attrs)
    wanted = wide_results(op, [*operands, w.decoded().cpu()], attrs)
    error = max(by_greatest(one.cpu(), other.double(), dtype) for one, other in zip(found, wanted, strict=True))
    return Finding(op, f"codes {kind}", dtype, error / 2, "")


def router_findings(everything: bool) -> Iterator[Finding]:
    groups = {"scoring": "sigmoid", "groups": 4, "top_groups": 2, "group_score": "top2"}
    for number, attrs in enumerate(({}, groups, {"groups": 3, "top_groups": 2, "renormalize": False, "factor": 2.5})):
        both = [("f32", None), ("bf16", torch.randn(12).bfloat16())]
        for dtype, bias in both if everything else [both[number % 2]]:
            logits = torch.randn(5, 12).to(DTYPES[dtype])
            yield compared("topk_router", str(attrs), dtype, [logits, bias], {"A": 4, **attrs}, is_sum=True)


DRAWN = [torch.tensor([0.0, 1.0, 0.7]), None, torch.tensor([0.9] * 3), None, torch.rand(3)]


def sample_findings() -> Iterator[Finding]:
    logits = torch.randn(5, 9000)
    logits[1, 77] = logits[1, 8000] = 50.0
    logits[2, 8999] = 50.0
    logits[3] = -torch.inf
    logits[4, 8100] = logits[4, 4500] = torch.nan
    yield compared("sample", "greedy: a tie, the last one, nothing finite, NaN", "f32", [logits], {})
    yield compared("sample", "drawn", "f32", [logits[:3], *DRAWN], {})
    heat = torch.tensor([0.7, 0.1, 0.0, 1.5, 1.0])
    uniform = torch.tensor([0.3, 0.9, 0.5, 0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    logits = torch.randn(5, 9000)
    yield compared("draw", "both ends, a greedy row", "f32", [logits, logits.argmax(-1), heat, uniform], {})


def head_and_sample_findings(everything: bool) -> Iterator[Finding]:
    """Small integers, so that sums are exact and many logits tie."""
    some = [("f32", 1, 37), ("bf16", 3, 100), ("f16", 19, 70)]
    for dtype, M, V in [*some, ("bf16", 3, 600), ("f32", 40, 70), ("bf16", 0, 70)] if everything else some:
        x, w, bias = (torch.randint(-1, 2, shape).to(DTYPES[dtype]) for shape in ((M, 300), (V, 300), (V,)))
        for one in (None, bias) if everything else (bias if dtype == "bf16" else None,):
            operands = [strided(x), strided(w), one]
            yield compared("lm_head_sample", f"M={M} V={V}", dtype, operands, {}, is_sum=True)
        if M == 3:
            yield compared("lm_head_sample", "drawn", dtype, [x, w, None, *DRAWN], {}, is_sum=True)
            yield special("lm_head_sample", [x, w], {}, dtype)


def merge_findings() -> Iterator[Finding]:
    """More blocks than one iteration of the merges takes."""
    block_max = torch.randint(0, 99, (3, 2500)).float()
    block_max[1], block_max[2, 2100], block_max[2, 2200] = -torch.inf, torch.nan, torch.nan
    block_argmax = 16 * torch.arange(2500).int().repeat(3, 1)
    for op, merge in (("lm_head_sample", _lm_head_sample_merge), ("sample", _sample_merge)):
        tokens = torch.empty(3, dtype=torch.int64, device=DEVICE)
        operands = (block_max.to(DEVICE), block_argmax.to(DEVICE), tokens, 2500)
        merge[(3,)](*operands, BLOCK_B=1024, enable_fp_fusion=False)
        is_right = torch.equal(tokens.cpu(), 16 * block_max.argmax(-1))
        yield Finding(op, "many blocks", "f32", 0.0, "" if is_right else "other tokens")


def cache_and_pool_findings() -> Iterator[Finding]:
    starts, slots = torch.tensor([0, 1, 4, 9]).int(), torch.tensor([3, 9, 0, 15, 7]).int()
    for dtype, kind in DTYPES.items():
        k, v, *caches = (
            torch.randn(shape).to(kind) for shape in ((5, 3, 20), (5, 3, 12), (4, 4, 3, 20), (4, 4, 3, 12))
        )
        yield compared("kv_store", "", dtype, [strided(k), strided(v), *caches, slots], {})
        rows = strided(torch.randn(9, 20).to(kind))
        yield compared("pool_first", "", dtype, [rows, starts], {})
        yield compared("pool_last", "", dtype, [rows, starts], {})
        yield compared("embedding_shard", "", dtype, [torch.tensor([0, 7, 12, 30]).int(), rows], {"first": 5})


def query_key_findings(everything: bool) -> Iterator[Finding]:
    """Norm and rotation of heads, and their store to the cache, from one packed projection of 4 + 2 * 2 heads."""
    attrs = {"Nq": 4, "Nkv": 2, "D": 12}
    for dtype in ("f32", "bf16", "f16") if everything else ("f32", "bf16"):
        kind = DTYPES[dtype]
        caches = [torch.randn(4, 4, 2, 12).to(kind) for _ in range(2)]
        pos, slots = torch.tensor([4, 8]).int(), torch.tensor([3, 9]).int()
        rest = [pos, strided(torch.randn(9, 5)), strided(torch.randn(9, 5)), *caches, slots]
        qkv, norms = strided(torch.randn(2, 96).to(kind)), [torch.randn(12).to(kind) for _ in range(2)]
        for op in ("qk_rope_kv_store", "qk_rope_interleaved_kv_store"):
            yield compared(op, "", dtype, [qkv, *rest], attrs)
        for op in ("qk_norm_rope_kv_store", "qk_norm_1p_rope_kv_store"):
            yield compared(op, "", dtype, [qkv, *norms, *rest], attrs)


def batch_invariance_findings() -> Iterator[Finding]:
    """The result of a row or a sequence is the same to the bit with and without others in the batch."""
    for op, operands, attrs in batches():
        operands = [x.to(DEVICE) for x in operands]
        own = [first(x, name) for name, x in zip(OPS[op].input_types, operands, strict=False)]
        together, alone = (call(KERNELS[op], one, attrs) for one in (operands, own))
        is_same = all(torch.equal(x[:1], y) for x, y in zip(together, alone, strict=True))
        yield Finding(op, "alone", "f32", 0.0, "" if is_same else "other bits than in a batch")


def batches() -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    yield "rms_norm", [torch.randn(20, 100), torch.randn(100)], {}
    yield "linear", [torch.randn(32, 300), torch.randn(37, 300)], {}
    yield "add_rms_norm_linear", [*torch.randn(2, 32, 300), torch.randn(37, 300), torch.randn(300)], {}
    q, *cache = paged([37, 600], torch.float32)
    yield "paged_decode_attention", [q[:2], *cache], {"scale": 0.3}


def first(x: Tensor, name: str) -> Tensor:
    """The operand for the first row or sequence alone; the shared ones unchanged."""
    is_shared = name in ("w", "norm_w", "k_cache", "v_cache")
    return x if is_shared else x[:1, :3] if name == "block_table" else x[:1]
