"""The workloads of `gpu.py`: calls of our kernels, the same work by torch, and their bytes and operations."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Work:
    """One row of the table. `flops` is 0 for work that is limited by memory bandwidth."""

    name: str
    ours: Call
    bytes: int
    flops: int = 0
    peers: Mapping[str, Call] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the work: those of a model of 8 billion parameters, or tiny ones for a dry run."""

    rows: int = 8192
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    vocab: int = 128256
    batch: int = 64
    context: int = 2048
    prompt: int = 4096
    experts: int = 64


TINY = Scale(
    rows=3, hidden=96, inner=64, heads=4, kv_heads=2, width=16, vocab=300, batch=2, context=40, prompt=20, experts=3
)


def works(kernels: Mapping[str, Call], s: Scale, device: torch.device) -> Iterator[Work]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).to(torch.bfloat16)

    yield from row_works(kernels, s, random)
    for batch, context in ((s.batch, s.context), (1, 4 * s.context)):
        yield decode_work(kernels, s, batch, context, random, device)
    yield prefill_work(kernels, s, random, device)
    for rows in (1, 16):
        yield linear_work(kernels, s, rows, random)
    yield experts_work(kernels, s, random, device)
    logits = torch.randn(s.batch, s.vocab, device=device)
    yield Work(
        "sample, greedy", lambda: kernels["sample"](logits), logits.nbytes, 0, {"torch": lambda: logits.argmax(-1)}
    )


def row_works(kernels: Mapping[str, Call], s: Scale, random: Callable[..., torch.Tensor]) -> Iterator[Work]:
    x, residual, w = random(s.rows, s.hidden), random(s.rows, s.hidden), random(s.hidden)
    yield Work(
        "fused_add_rms_norm",
        lambda: kernels["fused_add_rms_norm"](x, residual, w, eps=1e-6),
        4 * x.nbytes,
        0,
        {"torch": lambda: functional.rms_norm(x + residual, (s.hidden,), w, 1e-6)},
    )
    gu = random(s.rows, 2 * s.inner)
    yield Work(
        "silu_mul",
        lambda: kernels["silu_mul"](gu),
        gu.nbytes * 3 // 2,
        0,
        {"torch": lambda: functional.silu(gu[:, : s.inner]) * gu[:, s.inner :]},
    )


def decode_work(
    kernels: Mapping[str, Call],
    s: Scale,
    batch: int,
    context: int,
    random: Callable[..., torch.Tensor],
    device: torch.device,
) -> Work:
    """The peer reads contiguous keys and values, without a block table."""
    width = -(-context // 16)
    k, v = (random(batch * width, 16, s.kv_heads, s.width) for _ in range(2))
    table = torch.randperm(batch * width, device=device).view(batch, width).int()
    lengths = torch.full((batch,), context, device=device, dtype=torch.int32)
    q, scale = random(batch, s.heads, s.width), s.width**-0.5
    dense = [x.view(batch, width * 16, s.kv_heads, s.width)[:, :context].transpose(1, 2) for x in (k, v)]
    return Work(
        f"paged_decode_attention, {batch} x {context}",
        lambda: kernels["paged_decode_attention"](q, k, v, table, lengths, scale=scale),
        2 * batch * context * s.kv_heads * s.width * 2,
        0,
        {"SDPA": lambda: functional.scaled_dot_product_attention(q[:, :, None], *dense, enable_gqa=True)},
    )


def prefill_work(
    kernels: Mapping[str, Call], s: Scale, random: Callable[..., torch.Tensor], device: torch.device
) -> Work:
    width = -(-s.prompt // 16)
    k, v = (random(width, 16, s.kv_heads, s.width) for _ in range(2))
    table = torch.arange(width, device=device, dtype=torch.int32)[None]
    lengths = torch.full((1,), s.prompt, device=device, dtype=torch.int32)
    starts = torch.tensor([0, s.prompt], device=device, dtype=torch.int32)
    q, scale = random(s.prompt, s.heads, s.width), s.width**-0.5
    rows = [
        x.reshape(-1, heads, s.width)[: s.prompt].transpose(0, 1)[None]
        for x, heads in ((q, s.heads), (k, s.kv_heads), (v, s.kv_heads))
    ]
    peers: dict[str, Call] = {
        "SDPA": lambda: functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
    }
    if device.type == "cuda":
        peers["FlexAttention"] = flex_attention(rows, s.prompt)
    return Work(
        f"paged_prefill_attention, {s.prompt}",
        lambda: kernels["paged_prefill_attention"](q, k, v, table, lengths, starts, scale=scale),
        2 * (q.nbytes + k.nbytes),
        2 * s.prompt**2 * s.heads * s.width,
        peers,
    )


def flex_attention(rows: list[torch.Tensor], length: int) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, m, n: m >= n, None, None, length, length)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(*rows, block_mask=mask, enable_gqa=True)


def linear_work(kernels: Mapping[str, Call], s: Scale, rows: int, random: Callable[..., torch.Tensor]) -> Work:
    x, w = random(rows, s.hidden), random(2 * s.inner, s.hidden)
    return Work(
        f"linear, {rows} rows",
        lambda: kernels["linear"](x, w),
        w.nbytes,
        0,
        {"cuBLAS": lambda: functional.linear(x, w)},
    )


def experts_work(
    kernels: Mapping[str, Call], s: Scale, random: Callable[..., torch.Tensor], device: torch.device
) -> Work:
    """As many tokens as experts, so that most expert weights are read; `bytes` counts only those."""
    x, w = random(s.experts, s.hidden), random(s.experts, s.inner // 8, s.hidden)
    chosen = torch.randint(0, s.experts, (s.experts, 2), device=device, dtype=torch.int32)
    read = chosen.unique().numel() * w[0].nbytes
    return Work("expert_linear", lambda: kernels["expert_linear"](x, chosen, w), read)
