"""Tests of what ops mean: derived costs and the reference kernels, against plain torch."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM.codegen import driver
from sageLLM.codegen.expr.size import formula
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.op import OpDef
from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.generated.ops import OPS
from sageLLM.runtime.core.ir.types import TensorType

CASES = Path(__file__).parent / "cases" / "good"
torch.manual_seed(0)


@pytest.fixture(scope="module")
def ops(memo: LinkMemo) -> dict[str, OpDef]:
    return dict(driver.load_and_link(memo=memo).ops)


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[..., Tensor]]:
    """Generates a good case's op from its YAML, and returns its reference kernel."""

    def kernel(case: str) -> Callable[..., Tensor]:
        package = f"generated_{case}"
        driver.generate([CASES / case], tmp_path / package)
        monkeypatch.syspath_prepend(tmp_path)
        module = importlib.import_module(f"{package}.kernels.reference.spec")
        for name in [name for name in sys.modules if name.startswith(package)]:
            monkeypatch.delitem(sys.modules, name)
        found: Callable[..., Tensor] = getattr(module, module.__all__[0])
        return found

    return kernel


@pytest.mark.parametrize(
    ("name", "flops", "bytes_"),
    [
        ("add", "H * R", "3 * E_size * H * R"),
        ("linear", None, None),
        ("fused_add_rms_norm", "T * (H * has_w + 4 * H + 2)", "E_size * H * (4 * T + has_w)"),
        ("split_qkv", "0", "0"),
        ("embedding", "0", "2 * T * (E_size * H + 2)"),
        (
            "lm_head",
            "S * V * (2 * H + has_bias)",
            "E_size * H * S + E_size * H * V + E_size * V * has_bias + 4 * S * V",
        ),
        (
            "paged_decode_attention",
            "2 * KV * Nq * (D + Dv)",
            "B * D * E_size * Nq + B * Dv * E_size * Nq + D * KV * Nkv * kv_size + Dv * KV * Nkv * kv_size"
            " + 2 * KV * Nkv * kv_scale",
        ),
    ],
)
def test_costs(ops: dict[str, OpDef], name: str, flops: str | None, bytes_: str | None) -> None:
    cost = ops[name].cost
    if flops is None:
        values = {"R": 3, "K": 5, "N": 7, "has_bias": 1, "E_size": 2}
        assert cost.flops.evaluate(values) == 2 * 3 * 5 * 7 + 3 * 7
        assert cost.bytes.evaluate(values) == 2 * (3 * 5 + 7 * 5 + 7 + 3 * 7)
    else:
        assert (formula(cost.flops), formula(cost.bytes)) == (flops, bytes_)


def test_a_fused_op_reads_only_what_comes_from_outside(ops: dict[str, OpDef]) -> None:
    values = {"T": 3, "H": 5, "R": 3, "E_size": 2, "has_w": 1}
    fused, parts = ops["fused_add_rms_norm"].cost, [ops["add"].cost, ops["rms_norm"].cost]
    assert fused.flops.evaluate(values) == sum(part.flops.evaluate(values) for part in parts)
    assert fused.bytes.evaluate(values) == sum(part.bytes.evaluate(values) for part in parts) - 3 * 5 * 2


def test_fused_equals_unfused() -> None:
    x, residual = torch.randn(2, 5, 33).to(torch.bfloat16)
    w = torch.randn(33, dtype=torch.bfloat16)
    y, h = KERNELS["fused_add_rms_norm"](x, residual, w, eps=1e-6)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, KERNELS["rms_norm"](x + residual, w, eps=1e-6))


def test_a_spec_gives_node_classes_with_typed_accessors() -> None:
    types = {"x": TensorType("bf16", (4, 8)), "w": TensorType("bf16", (8,))}
    assert OPS["rms_norm"].infer(types, {}) == {"y": TensorType("bf16", (4, 8))}
    assert OPS["fused_add_rms_norm"].inplace == {"h": "residual"}


def test_gelu_from_yaml_alone(overlay: Callable[[str], Callable[..., Tensor]]) -> None:
    gu = torch.randn(5, 14)
    wanted = torch.nn.functional.gelu(gu[:, :7], approximate="tanh") * gu[:, 7:]
    torch.testing.assert_close(overlay("gelu_gate")(gu), wanted)


def test_norms_from_yaml_alone(overlay: Callable[[str], Callable[..., Tensor]]) -> None:
    x, w, b = torch.randn(2, 3, 16), torch.randn(16), torch.randn(16)
    torch.testing.assert_close(overlay("unit_offset_norm")(x, w), torch.nn.functional.rms_norm(x, (16,), 1 + w, 1e-6))
    norm = overlay("mean_norm")
    torch.testing.assert_close(norm(x, w, b), torch.nn.functional.layer_norm(x, (16,), w, b))
    torch.testing.assert_close(norm(x, w), torch.nn.functional.layer_norm(x, (16,), w))


def test_axes_are_put_in_place(overlay: Callable[[str], Callable[..., Tensor]]) -> None:
    x, w = torch.randn(2, 3, 4), torch.randn(3)
    wanted = (x * w[:, None]).softmax(1).amax(1).T
    torch.testing.assert_close(overlay("row_softmax")(x, w), wanted)
    weight = torch.randn(3, 4, 5)
    torch.testing.assert_close(overlay("batched_dot")(x, weight), torch.einsum("tnd,ndk->tnk", x, weight))


def test_activations_from_yaml_alone(overlay: Callable[[str], Callable[..., Tensor]]) -> None:
    x = torch.randn(4, 6) * 100
    torch.testing.assert_close(overlay("squared_relu")(x), x.relu() ** 2)
    torch.testing.assert_close(overlay("soft_bound")(x, cap=30.0), 30 * torch.tanh(x / 30))


# paged attention

BS, NKV, GROUP, DIM = 4, 2, 3, 8


def paged(lens: list[int], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of each sequence, and caches in which they lie in shuffled blocks; unused slots hold NaN."""
    blocks = [-(-length // BS) for length in lens]
    order = (torch.randperm(sum(blocks)) + 1).tolist()
    caches = torch.full((2, sum(blocks) + 1, BS, NKV, DIM), math.nan, dtype=dtype)
    table = torch.zeros(len(lens), max(blocks), dtype=torch.int32)
    keys = []
    for b, length in enumerate(lens):
        own = [order.pop() for _ in range(blocks[b])]
        table[b, : blocks[b]] = torch.tensor(own, dtype=torch.int32)
        kv = torch.randn(2, length, NKV, DIM).to(dtype)
        for position in range(length):
            caches[:, own[position // BS], position % BS] = kv[:, position]
        keys.append(kv)
    return keys, caches[0], caches[1], table, torch.tensor(lens, dtype=torch.int32)


def attention(
    q: Tensor,
    kv: Tensor,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """One sequence, in float64: q [C, Nq, D] are the last rows. The terms of the softmax are written out."""
    k, v = kv.double().repeat_interleave(GROUP, 2)
    score = torch.einsum("mhd,nhd->hmn", q.double(), k) * DIM**-0.5
    m = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
    n = torch.arange(len(k))
    score = score if slopes is None else score - slopes.double().view(-1, 1, 1) * (m - n)
    score = score if cap is None else cap * torch.tanh(score / cap)
    mask = n <= m if window is None else (n <= m) & (n > m - window)
    mask = mask if chunk is None else mask & (n // chunk == m // chunk)
    terms = score.exp() * mask
    denominator = terms.sum(-1) if sinks is None else terms.sum(-1) + sinks.double().exp().view(-1, 1)
    return torch.einsum("hmn,nhd->mhd", terms / denominator.unsqueeze(-1), v)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (1, None), (3, None), (None, 4), (None, 1)])
def test_decode_attention(window: int | None, chunk: int | None) -> None:
    keys, k_cache, v_cache, table, lens = paged([1, 9, 4, 7])
    q = torch.randn(4, NKV * GROUP, DIM)
    found = KERNELS["paged_decode_attention"](
        q, k_cache, v_cache, table, lens, scale=DIM**-0.5, window=window, chunk=chunk
    )
    wanted = torch.cat([attention(q[b : b + 1], keys[b], window, chunk=chunk) for b in range(4)])
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (2, None), (None, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_prefill_attention(window: int | None, chunk: int | None, dtype: torch.dtype) -> None:
    counts, lens = [1, 5, 300, 2], [6, 5, 301, 9]
    keys, k_cache, v_cache, table, seq_lens = paged(lens, dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(counts), NKV * GROUP, DIM).to(dtype)
    found = KERNELS["paged_prefill_attention"](
        q, k_cache, v_cache, table, seq_lens, starts, scale=DIM**-0.5, window=window, chunk=chunk
    )
    wanted = torch.cat(
        [attention(part, kv, window, chunk=chunk) for part, kv in zip(q.split(counts), keys, strict=True)]
    )
    assert isinstance(found, Tensor) and found.dtype == dtype
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["sinks", "slopes", "softcap", "all"])
def test_what_else_attention_may_do_to_scores(name: str) -> None:
    """As prefill of several rows, and as decode of each last one; the values are narrower than the keys."""
    heads = NKV * GROUP
    more = {"sinks": torch.randn(heads), "slopes": torch.rand(heads), "softcap": 3.0}
    given = more if name == "all" else {name: more[name]}
    counts, lens = [3, 1, 5], [9, 4, 5]
    keys, k_cache, v_cache, table, seq_lens = paged(lens)
    q = torch.randn(sum(counts), heads, DIM) * 3
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    common: dict[str, Any] = {"scale": DIM**-0.5, "window": 4, **given}
    named = {"cap" if key == "softcap" else key: value for key, value in given.items()}
    wanted = torch.cat([attention(part, kv, 4, **named) for part, kv in zip(q.split(counts), keys, strict=True)])
    found = KERNELS["paged_prefill_attention"](q, k_cache, v_cache[..., :5], table, seq_lens, starts, **common)
    torch.testing.assert_close(found, wanted[..., :5].float(), rtol=1e-5, atol=1e-5)
    last = (starts[1:] - 1).long()
    found = KERNELS["paged_decode_attention"](q[last], k_cache, v_cache[..., :5], table, seq_lens, **common)
    torch.testing.assert_close(found, wanted[last][..., :5].float(), rtol=1e-5, atol=1e-5)


def test_rows_of_no_keys_give_zero_and_neighbours_do_not_matter() -> None:
    _, k_cache, v_cache, table, lens = paged([5, 12])
    q, kernel = torch.randn(2, NKV * GROUP, DIM), KERNELS["paged_decode_attention"]
    both = kernel(q, k_cache, v_cache, table, lens, scale=0.3)
    alone = kernel(q[:1], k_cache, v_cache, table[:1], lens[:1], scale=0.3)
    assert isinstance(both, Tensor) and isinstance(alone, Tensor)
    torch.testing.assert_close(both[:1], alone, rtol=1e-6, atol=1e-6)
    empty = kernel(q, k_cache, v_cache, table, torch.tensor([0, 12], dtype=torch.int32), scale=0.3)
    assert isinstance(empty, Tensor) and torch.equal(empty[0], torch.zeros_like(q[0])) and not empty.isnan().any()


def test_a_soft_cap_is_a_hook(overlay: Callable[[str], Callable[..., Tensor]]) -> None:
    keys, k_cache, v_cache, table, lens = paged([6, 3])
    q = torch.randn(2, NKV * GROUP, DIM) * 20
    found = overlay("capped_attention")(q, k_cache, v_cache, table, lens, scale=DIM**-0.5, cap=5.0)
    wanted = torch.cat([attention(q[b : b + 1], keys[b], cap=5.0) for b in range(2)])
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


# KV cache, sampling, collectives


def test_kv_store_and_migrate() -> None:
    k, v = torch.randn(2, 3, NKV, DIM)
    caches = [torch.zeros(4, BS, NKV, DIM) for _ in range(4)]
    KERNELS["kv_store"](k, v, caches[0], caches[1], torch.tensor([5, 0, 15], dtype=torch.int32))
    assert torch.equal(caches[0][1, 1], k[0]) and torch.equal(caches[1][3, 3], v[2])
    blocks = torch.tensor([1, 3]), torch.tensor([2, 0])
    out = KERNELS["kv_copy"](*caches, *blocks)
    assert out[0] is caches[2] and torch.equal(caches[2][2], caches[0][1]) and torch.equal(caches[3][0], caches[1][3])


def test_sample_is_greedy_without_a_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
    sample = KERNELS["sample"]
    assert sample(logits).tolist() == [1, 0]
    zero, noise = torch.tensor([0.0, 0.0]), torch.tensor([0.9, 0.9])
    assert sample(logits, zero, noise=noise).tolist() == [1, 0]


def test_sample_inverts_the_cumulative_distribution() -> None:
    p = torch.tensor([0.1, 0.4, 0.3, 0.2])
    noise = torch.tensor([0.05, 0.11, 0.49, 0.51, 0.79, 0.81, 0.999999])
    logits = p.log().expand(7, 4)
    tokens = KERNELS["sample"](logits, torch.ones(7), noise=noise)
    assert tokens.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {1, 2}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 0.6}, {1, 2}),
        ({"top_k": 0}, {0, 1, 2, 3}),
    ],
)
def test_sample_cuts(cut: dict[str, float], kept: set[int]) -> None:
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2]).log().expand(64, 4)
    limits = {name: torch.full((64,), value) for name, value in cut.items()}
    tokens = KERNELS["sample"](logits, torch.ones(64), noise=torch.arange(64) / 64, **limits)
    assert set(tokens.tolist()) == kept


def test_embedding_shards_add_up() -> None:
    ids, table = torch.tensor([0, 5, 9, 4], dtype=torch.int32), torch.randn(10, 3)
    parts = [KERNELS["embedding_shard"](ids, table[first : first + 5], first=first) for first in (0, 5)]
    assert torch.equal(parts[0] + parts[1], KERNELS["embedding"](ids, table))


def test_collectives_of_one_rank_do_nothing() -> None:
    x = torch.randn(2, 3)
    assert KERNELS["all_reduce"](x, group="tp") is x
    assert KERNELS["all_gather"](x, W=1, group="tp") is x
    assert KERNELS["recv"](KERNELS["send"](x, peer=0, group="pp"), peer=0, group="pp") is x
