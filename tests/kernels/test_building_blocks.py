"""Ops defined by equations against the equivalent functions of torch, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sageLLM.generated.kernels.reference import KERNELS


def random(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(found: Tensor | tuple[Tensor, ...], wanted: Tensor) -> None:
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": functional.silu,
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("op", ACTIVATIONS)
def test_activation(op: str) -> None:
    x = random(2, 5, 14)
    assert_same(KERNELS[op](x), ACTIVATIONS[op](x))


@pytest.mark.parametrize("op", ["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid"])
def test_gate(op: str) -> None:
    gu = random(2, 5, 14)
    gate, up = gu.chunk(2, -1)
    assert_same(KERNELS[f"{op}_mul"](gu), ACTIVATIONS[op](gate) * up)


def test_clamped_gate() -> None:
    gu = random(5, 14) * 2
    gate, up = gu.chunk(2, -1)
    gate, up = gate.clamp(max=4.0), up.clamp(-4.0, 4.0)
    assert_same(KERNELS["clamped_silu_mul"](gu, alpha=1.5, limit=4.0), (up + 1) * gate * torch.sigmoid(gate * 1.5))


def test_norms() -> None:
    x, w, b = random(3, 4, 10), random(10, seed=1), random(10, seed=2)
    assert_same(KERNELS["rms_norm"](x, eps=0.1), functional.rms_norm(x, (10,), eps=0.1))
    assert_same(KERNELS["rms_norm"](x, w, eps=0.1), functional.rms_norm(x, (10,), w, 0.1))
    assert_same(KERNELS["rms_norm_wide"](x, w, eps=0.1), functional.rms_norm(x, (10,), w, 0.1))
    assert_same(KERNELS["rms_norm_1p"](x, w, eps=0.1), functional.rms_norm(x, (10,), 1 + w, 0.1))
    assert_same(KERNELS["layer_norm"](x, eps=0.1), functional.layer_norm(x, (10,), eps=0.1))
    assert_same(KERNELS["layer_norm"](x, w, eps=0.1), functional.layer_norm(x, (10,), w, eps=0.1))
    assert_same(KERNELS["layer_norm"](x, w, b, eps=0.1), functional.layer_norm(x, (10,), w, b, 0.1))
    assert_same(KERNELS["layer_norm_1p"](x, w, b, eps=0.1), functional.layer_norm(x, (10,), 1 + w, b, 0.1))


def test_arithmetic() -> None:
    x, y, w, gate = random(3, 4, 10), random(3, 4, 10, seed=1), random(10, seed=2), random(3, 4, 1, seed=3)
    assert_same(KERNELS["mul"](x, y), x * y)
    assert_same(KERNELS["mul_weight"](x, w), x * w)
    assert_same(KERNELS["add_bias"](x, w), x + w)
    assert_same(KERNELS["mul_rows"](x, gate), x * gate)
    assert_same(KERNELS["scale"](x, factor=0.3), x * 0.3)
    assert_same(KERNELS["soft_cap"](x, cap=2.5), 2.5 * torch.tanh(x / 2.5))


def test_a_bias_on_the_head() -> None:
    x, w, b = random(3, 10), random(7, 10, seed=1), random(7, seed=2)
    assert_same(KERNELS["lm_head"](x, w, b), functional.linear(x, w, b))


def test_position_embedding_begins_at_its_offset() -> None:
    table = random(9, 4)
    pos = torch.tensor([0, 3, 6], dtype=torch.int32)
    assert_same(KERNELS["position_embedding"](pos, table, offset=2), table[[2, 5, 8]])


def test_parts_of_the_last_dim() -> None:
    x = random(2, 3, 10)
    a, b = KERNELS["split_last"](x, Na=4)
    assert_same(a, x[..., :4])
    assert_same(KERNELS["concat_last"](a, b), x)
    a, b = KERNELS["split_halves"](x)
    assert_same(b, x[..., 5:])
    assert_same(KERNELS["split_heads"](x[0], N=5, D=2), x[0].reshape(3, 5, 2))
