"""Parts of `gpu.py` that time kernels: decode and prefill attention, linear layers, experts, rows and sampling."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from gpu_table import Call, Calls, Table, Variant, rotated
from torch import Tensor
from torch.nn import functional

from sageLLM.generated.kernels.reference.kv_forms import kv_rows
from sageLLM.generated.kernels.triton import KERNELS
from sageLLM.runtime.core.model.kv_form import KV_FORMS, SCALE_BYTES
from sageLLM.runtime.kernels.coded_tensor import coded_tensor
from sageLLM.runtime.kernels.cpu.coded import FORMS, CodedWeight
from sageLLM.runtime.kernels.kv_codes import TORCH_TYPES

BLOCK = 16
"""Tokens per KV block, as the engine's default."""
SIZES_8B = {"R": 32, "H": 4096, "I": 14336}


def random(table: Table, *shape: int) -> Tensor:
    return torch.randn(shape, device=table.device, dtype=torch.float32).to(torch.bfloat16)


def integers(table: Table, values: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32).to(table.device)


# Decode attention


def decode(table: Table) -> None:
    """Batches and contexts by splits and stages, and one of them with a table as wide as that of 131,072 tokens."""
    cases = [(1, 1024), (1, 8192), (1, 65536), (16, 2048), (64, 2048)]
    variants = [{}, *({"SPLIT": split, "STAGES": stages} for split, stages in product((128, 256, 512), (3, 5)))]
    if table.is_dry:
        cases, variants = [(2, 40)], [{}, {"SPLIT": 16}]
    for (batch, context), variant in product(cases, variants):
        decode_row(table, batch, context, variant)
    batch, context = cases[-1]
    decode_row(table, batch, context, {}, width=8192 if not table.is_dry else 8)
    variants = [{}, *({"BLOCK_N": block, "STAGES": stages} for block, stages in product((32, 64), (3, 5)))]
    for (batch, context), form, variant in product(cases, KV_FORMS, [{}] if table.is_dry else variants):
        decode_row(table, batch, context, variant, form=form)


def decode_row(table: Table, batch: int, context: int, variant: dict[str, int], width: int = 0, form: str = "") -> None:
    """With a `form` the KV cache has codes. The peers read contiguous keys and values, without a block table."""
    heads, kv_heads, size = (4, 2, 16) if table.is_dry else (32, 8, 128)
    num_blocks = -(-context // BLOCK)
    lengths, scale = integers(table, [context] * batch), size**-0.5

    def operands() -> list[Tensor]:
        k, v = (random(table, batch * num_blocks, BLOCK, kv_heads, size) for _ in range(2))
        if form:
            k, v = (kv_rows(x, torch.empty(0, dtype=TORCH_TYPES[KV_FORMS[form]], device=x.device)) for x in (k, v))
        blocks = integers(table, torch.randperm(batch * num_blocks).view(batch, num_blocks))
        blocks = functional.pad(blocks, (0, max(0, width - num_blocks)))
        return [k, v, random(table, batch, heads, size), blocks]

    def ours(k: Tensor, v: Tensor, q: Tensor, blocks: Tensor) -> Tensor:
        attention: Tensor = KERNELS["paged_decode_attention"](q, k, v, blocks, lengths, scale=scale)
        return attention

    def dense(k: Tensor, v: Tensor, q: Tensor, blocks: Tensor) -> Tensor:
        k, v = (x.view(batch, -1, kv_heads, size)[:, :context].transpose(1, 2) for x in (k, v))
        return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    name = f"{batch} x {context}" + (f", table of {width} blocks" if width else "")
    name += f", KV of {form}" if form else ""
    peers = {} if variant or width or form else {"SDPA": rotated(operands, dense)}
    chosen = Variant("paged_decode", variant) if variant else None
    row_bytes = size + SCALE_BYTES if form else 2 * size
    num_bytes = 2 * batch * context * kv_heads * row_bytes
    table.timed(name, rotated(operands, ours), num_bytes, 0, "decode", chosen, **peers)


# Linear layers


def linear(table: Table) -> None:
    """Rows by the shapes of Llama 8B and 1B and by tiles, beside cuBLAS: this sets the limit of rows."""
    shapes = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (2048, 2048), (2048, 8192), (128256, 4096)]
    rows: Sequence[int] = (1, 16, 32)
    tiles = [(16, 256, 3), (32, 256, 3), (64, 128, 5)]
    if table.is_dry:
        shapes, rows, tiles = [(48, 32)], (2,), [(16, 32, 3)]
    for (features, inputs), num_rows in product(shapes, rows):
        linear_row(table, num_rows, features, inputs, {})
        for block_n, block_k, stages in tiles:
            variant = {"BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": stages}
            linear_row(table, num_rows, features, inputs, variant)
    coded_linear(table)


def coded_linear(table: Table) -> None:
    """Weights of codes, at the goal of a GEMM of few rows: their bytes at the rate of a copy; cuBLAS reads bf16."""
    shapes, rows = ([(48, 64)], [2]) if table.is_dry else ([(4096, 4096), (28672, 4096)], [1, 16, 32])
    tiles = [(16, 64, 3)] if table.is_dry else [(16, 256, 3), (32, 128, 3), (64, 64, 4)]
    for (form, group), (features, inputs), num_rows in product((("int4", 32), ("int8", 64), ("fp8", 64)), shapes, rows):
        group = group if table.is_dry else 128
        variants = [{}, *({"BLOCK_N": n, "BLOCK_K": k, "STAGES": stages} for n, k, stages in tiles)]
        for variant in variants:
            coded_row(table, num_rows, features, inputs, form, group, variant)


def coded_row(
    table: Table, num_rows: int, features: int, inputs: int, form: str, group: int, variant: dict[str, int]
) -> None:
    def operands() -> list[Tensor]:
        counts = (features, inputs // group)
        words = torch.randint(-(2**31), 2**31, (features, inputs // 32 * FORMS[form].words), dtype=torch.int64)
        if form == "fp8":
            words &= 0x3F3F3F3F  # no NaN
        scales = torch.rand(counts, dtype=torch.float32).bfloat16()
        weight = CodedWeight(form, torch.Size((features, inputs)), group, words.int(), scales)
        return [random(table, num_rows, inputs), coded_tensor(weight, table.device)]

    def floats() -> list[Tensor]:
        return [random(table, num_rows, inputs), random(table, features, inputs)]

    num_bytes = features * (inputs * FORMS[form].bits // 8 + 2 * inputs // group)
    peers = {} if variant else {"cuBLAS in bf16": rotated(floats, functional.linear)}
    chosen, goal = (Variant("linear_codes", variant), "") if variant else (None, "linear")
    name = f"{form} by {group}, {num_rows} x {inputs} -> {features}"
    table.timed(name, rotated(operands, KERNELS["linear"]), num_bytes, 0, goal, chosen, **peers)


def linear_row(table: Table, num_rows: int, features: int, inputs: int, variant: dict[str, int]) -> None:
    def operands() -> list[Tensor]:
        return [random(table, num_rows, inputs), random(table, features, inputs)]

    peers = {} if variant else {"cuBLAS": rotated(operands, functional.linear)}
    chosen, goal = (Variant("linear", variant), "") if variant else (None, "linear")
    calls = rotated(operands, KERNELS["linear"])
    table.timed(f"{num_rows} x {inputs} -> {features}", calls, 2 * features * inputs, 0, goal, chosen, **peers)


# Prefill attention


def prefill(table: Table) -> None:
    """Prompts, and a hybrid step; head sizes; stages and blocks of keys."""
    cases = [([4096], 0), ([2048] * 4, 0), ([512], 64)]
    if table.is_dry:
        cases = [([20], 2)]
    for lengths, num_decodes in cases:
        prefill_row(table, lengths, num_decodes, 128, {})
    for size in (64, 256) if not table.is_dry else ():
        prefill_row(table, [4096], 0, size, {})
    variants = [{"STAGES": 2}, {"STAGES": 3}, {"BLOCK_N": 128, "STAGES": 3}] if not table.is_dry else [{"BLOCK_N": 16}]
    for variant in variants:
        prefill_row(table, cases[0][0], 0, 128, variant)


def prefill_row(
    table: Table, lengths: list[int], num_decodes: int, size: int, variant: dict[str, int], context: int = 2048
) -> None:
    """Prompts after `num_decodes` decodes of `context` tokens; peers only for prompts of one length."""
    heads, kv_heads = (4, 2) if table.is_dry else (32, 8)
    size, context = (16, 24) if table.is_dry else (size, context)
    all_lengths, counts = [context] * num_decodes + lengths, [1] * num_decodes + lengths
    num_blocks = -(-max(all_lengths) // BLOCK)
    num_rows, batch, scale = sum(counts), len(counts), size**-0.5
    blocks = integers(table, torch.arange(batch * num_blocks).view(batch, num_blocks))
    ends = integers(table, all_lengths)
    starts = integers(table, [0, *torch.tensor(counts).cumsum(0).tolist()])

    def operands() -> list[Tensor]:
        cache = (random(table, batch * num_blocks, BLOCK, kv_heads, size) for _ in range(2))
        return [random(table, num_rows, heads, size), *cache]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return KERNELS["paged_prefill_attention"](q, k, v, blocks, ends, starts, scale=scale)

    pairs = sum(length**2 // 2 for length in lengths) + num_decodes * context
    name = f"{num_decodes} decodes + {lengths}, D {size}" if num_decodes else f"{lengths}, D {size}"
    peers = {} if variant or num_decodes else attention_peers(table, batch, lengths[0], heads, kv_heads, size)
    chosen = Variant("paged_prefill", variant) if variant else None
    table.timed(name, rotated(operands, ours), 0, 4 * pairs * heads * size, "prefill", chosen, **peers)


def attention_peers(table: Table, batch: int, length: int, heads: int, kv_heads: int, size: int) -> dict[str, Calls]:
    """Causal attention over contiguous keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def operands() -> list[Tensor]:
        return [random(table, batch, count, length, size) for count in (heads, kv_heads, kv_heads)]

    def sdpa(backend: SDPBackend | None = None) -> Calls:
        def call(*rows: Tensor) -> Tensor:
            with sdpa_kernel([backend]) if backend else nullcontext():
                return functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)

        return rotated(operands, call)

    if table.is_dry:
        return {"SDPA": sdpa()}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    return {**{name: sdpa(one) for name, one in backends.items()}, "FlexAttention": lambda: flex(operands(), length)}


def flex(rows: list[Tensor], length: int) -> list[Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, length, length, device=str(rows[0].device))
    compiled = torch.compile(flex_attention)
    return [lambda: compiled(*rows, block_mask=mask, enable_gqa=True)]


# Experts, rows, positions and sampling


def others(table: Table) -> None:
    for add in (experts, rows, sampling):
        add(table)


def experts(table: Table) -> None:
    """Expert layers with 8 of 64 experts per token; `bytes` counts the experts that are read."""
    count, chosen, inputs, features = (3, 2, 32, 32) if table.is_dry else (64, 8, 4096, 1792)
    for num_rows in (1, 32, 4096) if not table.is_dry else (2,):

        def operands(num_rows: int = num_rows) -> list[Tensor]:
            routes = torch.rand(num_rows, count).topk(chosen).indices
            return [random(table, num_rows, inputs), integers(table, routes), random(table, count, features, inputs)]

        # The most experts that a batch can read, which many rows reach.
        num_bytes = 2 * min(count, num_rows * chosen) * inputs * features
        flops = 2 * num_rows * chosen * features * inputs if num_rows > 1000 else 0
        calls = rotated(operands, KERNELS["expert_linear"])
        table.timed(f"expert_linear, {num_rows} rows", calls, num_bytes, flops, "gemm" if flops else "")

        def router(num_rows: int = num_rows) -> list[Tensor]:
            return [random(table, num_rows, inputs), random(table, count, inputs)]

        calls = rotated(router, KERNELS["router_logits"])
        table.timed(f"router_logits, {num_rows} rows", calls, 2 * count * inputs)


def rows(table: Table) -> None:
    hidden, inner = (96, 64) if table.is_dry else (4096, 14336)
    for num_rows in (8192, 1) if not table.is_dry else (3,):
        w = random(table, hidden)
        for name, calls, num_bytes, peers in row_works(table, num_rows, hidden, inner, w):
            table.timed(f"{name}, {num_rows} rows", calls, num_bytes, goal="norm" if num_rows > 1 else "", **peers)


def row_works(
    table: Table, num_rows: int, hidden: int, inner: int, w: Tensor
) -> Iterator[tuple[str, Calls, int, dict[str, Calls]]]:
    def pairs() -> list[Tensor]:
        return [random(table, num_rows, hidden), random(table, num_rows, hidden)]

    def gates() -> list[Tensor]:
        return [random(table, num_rows, 2 * inner)]

    calls = rotated(pairs, lambda x, y: KERNELS["fused_add_rms_norm"](x, y, w, eps=1e-6))
    peers = {"torch": rotated(pairs, lambda x, y: functional.rms_norm(x + y, (hidden,), w, 1e-6))}
    yield "fused_add_rms_norm", calls, 8 * num_rows * hidden, peers
    calls = rotated(pairs, lambda x, _: KERNELS["rms_norm"](x, w, eps=1e-6))
    peers = {"torch": rotated(pairs, lambda x, _: functional.rms_norm(x, (hidden,), w, 1e-6))}
    yield "rms_norm", calls, 4 * num_rows * hidden, peers | liger(lambda x, _: liger_norm(x, w), pairs, table)
    calls = rotated(gates, KERNELS["silu_mul"])
    peers = {"torch": rotated(gates, lambda x: functional.silu(x[:, :inner]) * x[:, inner:])}
    peers |= liger(lambda x: liger_gate(x[:, :inner], x[:, inner:]), gates, table)
    yield "silu_mul", calls, 6 * num_rows * inner, peers


def liger(call: Callable[..., Any], operands: Callable[[], list[Tensor]], table: Table) -> dict[str, Calls]:
    return {} if table.is_dry else {"Liger": rotated(operands, call)}


def liger_norm(x: Tensor, w: Tensor) -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, w, 1e-6)


def liger_gate(gate: Tensor, up: Tensor) -> Any:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def sampling(table: Table) -> None:
    batch, vocab = (2, 300) if table.is_dry else (64, 128256)
    calls = rotated(lambda: [random(table, batch, vocab).float()], KERNELS["sample"])
    peer = rotated(lambda: [random(table, batch, vocab).float()], lambda x: x.argmax(-1))
    table.timed("sample, greedy", calls, 4 * batch * vocab, torch=peer)


# First calls


def ceilings(table: Table) -> None:
    """A copy of 1 GB, and a GEMM of 8192 in bf16."""
    count, side = (2**12, 64) if table.is_dry else (2**29, 8192)
    source = torch.zeros(count, dtype=torch.uint8, device=table.device)
    target = torch.empty_like(source)
    a = random(table, side, side)
    table.add("copy", lambda: {"rate": 2 * count / table.seconds([lambda: target.copy_(source)])})
    table.add("bf16 GEMM", lambda: {"rate": 2 * side**3 / table.seconds([lambda: a @ a])})


def launchers(table: Table) -> None:
    """Every launcher from equations at the sizes of an 8B model, then attention: a list of what fails."""
    from checks import OF_TEMPLATES, row_finding

    from sageLLM.generated.tests.cases import CASES

    names = sorted(KERNELS.keys() & CASES.keys() - OF_TEMPLATES) if not table.is_dry else ["rms_norm"]
    for name in names:

        def measure(name: str = name) -> dict[str, Any]:
            last = CASES[name].sizes[-1]
            sizes = last if table.is_dry else {**last, **{dim: SIZES_8B[dim] for dim in last.keys() & SIZES_8B.keys()}}
            found = row_finding(name, "8B sizes", sizes, "bf16")
            return {
                "error_to_tolerance": found.error,
                "wrong": found.wrong,
                "is_right": not found.wrong and found.error <= 1,
            }

        table.add(name, measure)
    attention_launchers(table)


def attention_launchers(table: Table) -> None:
    """Attention of all head sizes, groups and options against the reference."""
    from sageLLM.generated.kernels.reference import KERNELS as REFERENCES

    sizes = [(64, 64), (128, 128), (192, 128), (256, 256), (576, 512)]
    groups: Sequence[int] = (1, 4, 5, 8)
    options: list[dict[str, Any]] = [{}, {"window": 500}, {"softcap": 30.0}]
    lengths = [1, 511, 512, 513, 5000]
    if table.is_dry:
        sizes, groups, options, lengths = [(16, 16)], (2,), [{}], [1, 40]
    for (size, value_size), group, attrs in product(sizes, groups, options):
        for stage in ("paged_decode_attention", "paged_prefill_attention"):

            def measure(
                stage: str = stage,
                size: int = size,
                value_size: int = value_size,
                group: int = group,
                attrs: Any = attrs,
            ) -> dict[str, Any]:
                operands = attention_operands(table, lengths, stage, size, value_size, group)
                attrs = {"scale": size**-0.5, **attrs}
                found, expected = (
                    KERNELS[stage](*operands, **attrs).float(),
                    REFERENCES[stage](*operands, **attrs).float(),
                )
                error = ((found - expected).abs().max() / expected.abs().max()).item()
                return {"error_to_largest": error, "is_right": error < 2e-2}

            table.add(f"{stage}, D {size}/{value_size}, G {group}, {attrs}", measure)


def attention_operands(
    table: Table, lengths: list[int], stage: str, size: int, value_size: int, group: int
) -> list[Tensor]:
    """Keys and values of 2 heads; latent attention (576/512) has one, and its values are the leading part of keys."""
    kv_heads, batch, num_blocks = (1 if size == 576 else 2), len(lengths), -(-max(lengths) // BLOCK)
    k = random(table, batch * num_blocks, BLOCK, kv_heads, size)
    v = k[..., :value_size] if size == 576 else random(table, batch * num_blocks, BLOCK, kv_heads, value_size)
    blocks = integers(table, torch.randperm(batch * num_blocks).view(batch, num_blocks))
    counts = [1] * batch if stage == "paged_decode_attention" else [min(length, 70) for length in lengths]
    q = random(table, sum(counts), kv_heads * group, size)
    starts = [integers(table, [0, *torch.tensor(counts).cumsum(0).tolist()])]
    return [q, k, v, blocks, integers(table, lengths), *(starts if stage != "paged_decode_attention" else [])]
