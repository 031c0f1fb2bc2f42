"""Attention within sequences against torch, one sequence at a time, and against the rule of the mask."""

import pytest
import torch

from sageLLM.generated.kernels.reference import KERNELS

LENGTHS = [1, 300, 7, 0, 64]
Q_START = torch.tensor([0, 1, 301, 308, 308, 372], dtype=torch.int32)


def operands(num_heads: int = 4, num_kv_heads: int = 2, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(LENGTHS), num_heads, width), *[(sum(LENGTHS), num_kv_heads, width)] * 2)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(
    "attrs", [{}, {"causal": True}, {"window": 5}, {"causal": True, "window": 5}, {"softcap": 2.0}], ids=str
)
def test_each_sequence_attends_to_itself(attrs: dict[str, float]) -> None:
    q, k, v = operands()
    found = KERNELS["varlen_attention"](q, k, v, Q_START, scale=0.3, **attrs)
    for start, length in zip(Q_START.tolist(), LENGTHS, strict=False):
        rows = slice(start, start + length)
        one = [x[rows].transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
        assert torch.allclose(found[rows], plain(*one, attrs).transpose(0, 1), rtol=1e-12, atol=1e-12)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attrs: dict[str, float]) -> torch.Tensor:
    score = q @ k.transpose(1, 2) * 0.3
    if "softcap" in attrs:
        score = attrs["softcap"] * (score / attrs["softcap"]).tanh()
    position = torch.arange(q.shape[1])
    distance = position[:, None] - position
    if attrs.get("causal"):
        score = score.masked_fill(distance < 0, -torch.inf)
    if "window" in attrs:
        score = score.masked_fill(distance.abs() >= attrs["window"], -torch.inf)
    return score.softmax(-1) @ v


def test_pooling() -> None:
    x = torch.arange(12.0).reshape(6, 2)
    q_start = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    assert KERNELS["pool_first"](x, q_start).tolist() == [[0, 1], [2, 3], [8, 9]]
    assert KERNELS["pool_last"](x, q_start).tolist() == [[0, 1], [6, 7], [10, 11]]
    assert KERNELS["pool_mean"](x, q_start).tolist() == [[0, 1], [4, 5], [9, 10]]
    assert KERNELS["l2_norm"](torch.tensor([[0.0, 4.0], [0.0, 0.0]])).tolist() == [[0, 1], [0, 0]]
