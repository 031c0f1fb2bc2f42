"""Measured times of kernels by family, and the times that a device's efficiencies predict for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.core.cost import SECOND, Efficiency, Hardware, Link

Vector = npt.NDArray[np.float64]


ORDER = ("gemm", "experts", "prefill_attn", "decode_attn", "mixed_attn", "sample", "default")
"""Families in the order in which they are fitted; those of single ops follow."""


class Row(NamedTuple):
    """One measured kernel: its work, and the time in seconds.

    `sequences` and `context` are the sequences with a single query and the longest context of an attention kernel, and
    the last two the arithmetic and bytes of its prompts where it also serves decodes.
    """

    flops: float
    num_bytes: float
    seconds: float
    sequences: float = 0.0
    context: float = 0.0
    prompt_flops: float = 0.0
    prompt_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Kernels of one family, as columns; `dtype` is the element type of the arithmetic."""

    rows: Vector
    dtype: str = "bf16"
    _columns: dict[str, Vector] = field(init=False)

    def __post_init__(self) -> None:
        columns = {name: self.rows[:, i] for i, name in enumerate(Row._fields)}
        object.__setattr__(self, "_columns", columns)

    @classmethod
    def of(cls, rows: Sequence[Row], dtype: str = "bf16") -> Self:
        """The kernels of these rows."""
        return cls(np.array(rows, dtype=np.float64).reshape(-1, len(Row._fields)), dtype)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def seconds(self) -> Vector:
        return self._columns["seconds"]

    @property
    def max_intensity(self) -> float:
        """Operations per byte of the kernel that has most."""
        return float((self._columns["flops"] / np.maximum(self._columns["num_bytes"], 1.0)).max())

    def sample(self, most: int) -> Self:
        """At most this many rows, evenly spaced."""
        return type(self)(self.rows[:: max(1, -(-len(self) // most))], self.dtype)

    def predicted_s(self, hardware: Hardware, efficiency: Efficiency, prompts: Efficiency) -> Vector:
        """The times at an efficiency; `prompts` is that of the prompts in a kernel with decodes."""
        at = self._columns
        peak = hardware.peak_of(self.dtype)
        own = _combined(hardware, peak, efficiency, at["flops"], at["num_bytes"])
        own += _combined(hardware, peak, prompts, at["prompt_flops"], at["prompt_bytes"])
        fixed_us = hardware.launch_us(efficiency) + efficiency.sequence_us * at["sequences"]
        return own + fixed_us / SECOND + efficiency.context_ns / 1e9 * at["context"]


def _combined(hardware: Hardware, peak: float, efficiency: Efficiency, flops: Vector, num_bytes: Vector) -> Vector:
    """`Efficiency.combined` for kernels of one element type."""
    compute = flops / (peak * efficiency.compute)
    memory = num_bytes / (hardware.memory_bandwidth * efficiency.memory)
    longer = np.maximum(compute, memory)
    if efficiency.overlap is None:
        return longer
    share = np.minimum(compute, memory) / np.maximum(longer, 1e-30)
    total: Vector = longer * (1 + share**efficiency.overlap) ** (1 / efficiency.overlap)
    return total


class AllReduce(NamedTuple):
    """One measured all-reduce: bytes of the tensor, number of devices, seconds."""

    num_bytes: float
    ranks: int
    seconds: float

    def predicted_s(self, hardware: Hardware, link: Link) -> float:
        """The time of a ring over this link."""
        hops = self.ranks - 1
        ring_us = link.time_us(2 * hops / self.ranks * self.num_bytes, 2 * hops)
        return (hardware.launch_overhead_us + ring_us) / SECOND


@dataclass(slots=True)
class Measured:
    """All measured kernels by family (a key of `Hardware.efficiency`), and the all-reduces."""

    kernels: dict[str, list[Row]] = field(default_factory=dict)
    all_reduces: list[AllReduce] = field(default_factory=list)
    dtype: str = "bf16"

    def add(self, family: str, row: Row) -> None:
        """Adds a kernel."""
        self.kernels.setdefault(family, []).append(row)

    def families(self) -> dict[str, KernelTimes]:
        """The kernels of each family; prompts precede kernels with prompts and decodes, which depend on their fit."""
        first = [name for name in ORDER if name in self.kernels]
        names = [*first, *sorted(self.kernels.keys() - {*first})]
        return {name: KernelTimes.of(self.kernels[name], self.dtype) for name in names}


def gemm(m: float, n: float, k: float, seconds: float) -> Row:
    """A bf16 product of m rows with an [n, k] weight."""
    return Row(2 * m * n * k, 2 * (m * k + n * k + m * n), seconds)


def memory_bound(num_bytes: float, seconds: float) -> Row:
    """A kernel with negligible arithmetic."""
    return Row(0.0, num_bytes, seconds)


def experts(tokens: float, per_token: int, num_read: float, hidden: int, inner: int, seconds: float) -> Row:
    """Half of a mixture in one call, as the ops are two kernels, and the launch counts for each.

    A pair of a token and an expert takes products of [2 * inner, hidden] and [hidden, inner]; the weights of
    `num_read` experts are read.
    """
    pairs = tokens * per_token
    flops = 6 * pairs * hidden * inner
    num_bytes = 2 * (3 * num_read * hidden * inner + tokens * hidden + pairs * (3 * inner + hidden))
    return Row(flops / 2, num_bytes / 2, seconds / 2)


class Heads(NamedTuple):
    """Query heads, key and value heads, and elements per head."""

    num_q: int
    num_kv: int
    head_dim: int

    def prompt(self, start: float, num_tokens: float, seconds: float, num_prompts: float = 1) -> Row:
        """Equal chunks of prompts after `start` cached tokens."""
        flops, num_bytes = self._prompt_work(start, num_tokens)
        return Row(num_prompts * flops, num_prompts * num_bytes, seconds, context=start + num_tokens)

    def decodes(self, num: float, context: float, seconds: float) -> Row:
        """Decodes with equal contexts."""
        flops, num_bytes = self._decode_work(num, context)
        return Row(flops, num_bytes, seconds, num, context)

    def mixed(self, start: float, num_tokens: float, num: float, context: float, seconds: float) -> Row:
        """One chunk of a prompt together with decodes."""
        return Row(
            *self._decode_work(num, context),
            seconds,
            num,
            max(start + num_tokens, context),
            *self._prompt_work(start, num_tokens),
        )

    def _prompt_work(self, start: float, num_tokens: float) -> tuple[float, float]:
        pairs = num_tokens * start + num_tokens * (num_tokens + 1) / 2
        return self._work(pairs, start + num_tokens, num_tokens)

    def _decode_work(self, num: float, context: float) -> tuple[float, float]:
        return self._work(num * context, num * context, num)

    def _work(self, pairs: float, num_cached: float, num_queries: float) -> tuple[float, float]:
        """Arithmetic and bytes, as the formulas of the attention ops count them."""
        q, kv, d = self
        return 4 * q * d * pairs, 4 * kv * d * num_cached + 4 * q * d * num_queries
