"""Cost model for time and memory traffic: roofline for kernels, ring formulas for collectives, links for transfers.

A kernel takes as long as the slower of its arithmetic and its memory traffic, plus a launch (the roofline model of
Williams, Waterman and Patterson, CACM 52(4), 2009), corrected by fitted efficiencies where a device has them. A ring
all-reduce over n ranks sends 2 (n - 1) / n of the data over each link in 2 (n - 1) steps; an all-gather half of that
(Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.dims import Dim, evaluate, free_symbols, product
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.ir.types import DTYPES

SECOND = 1e6  # microseconds


@dataclass(frozen=True, slots=True)
class Link:
    """A connection: bandwidth in bytes per second in one direction, latency in microseconds to the first byte."""

    bandwidth: float
    latency_us: float

    def time_us(self, num_bytes: float, steps: int = 1) -> float:
        """Microseconds to send `num_bytes` in total over `steps` transfers, one after another."""
        return num_bytes / self.bandwidth * SECOND + steps * self.latency_us


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Fractions of a device's limits that a family of kernels reaches, fitted to measured times.

    A kernel takes `launch_us` (by default the device's `launch_overhead_us`) plus the norm of its time of arithmetic a
    and its time of memory traffic m, (a^p + m^p)^(1/p) with p = `overlap`: 1 adds them, infinity takes the longer.
    `memory` exceeds 1 where operands stay in a cache.

    Attention takes `context_ns` more per token of the longest context, over which a tile iterates, and `sequence_us`
    per sequence with a single query; these depend on the step and are added by its cost model.
    """

    compute: float = 1.0
    memory: float = 1.0
    overlap: float | None = None
    launch_us: float | None = None
    sequence_us: float = 0.0
    context_ns: float = 0.0

    def combined(self, compute: float, memory: float) -> float:
        """The time of a kernel with these times of arithmetic and memory traffic at full efficiency."""
        compute, memory = compute / self.compute, memory / self.memory
        longer, shorter = max(compute, memory), min(compute, memory)
        if self.overlap is None or not shorter:
            return longer
        return float(longer * (1 + (shorter / longer) ** self.overlap) ** (1 / self.overlap))


FULL = Efficiency()


@dataclass(frozen=True, slots=True)
class Hardware:
    """Limits of one device.

    `peak_flops` is in operations per second by dtype, `memory_bandwidth` in bytes per second. `link` connects devices,
    `host_link` connects to host memory (a KV tier), and `disk_link` to files; without it files are as fast as the host.
    `efficiency` is by op name, tag, op type in lower case, or "default"; without an entry an op reaches the limits.
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    memory_bytes: int
    launch_overhead_us: float
    link: Link
    host_link: Link
    efficiency: Mapping[str, Efficiency] = field(default_factory=dict)
    disk_link: Link | None = None

    def peak_of(self, dtype: str) -> float:
        """Operations per second for a dtype; for one without a figure, the slowest known rate."""
        return self.peak_flops.get(dtype) or min(self.peak_flops.values())

    def roofline_us(self, flops: float, num_bytes: float, dtype: str, efficiency: Efficiency = FULL) -> float:
        """Microseconds of a kernel: arithmetic and memory traffic at an efficiency, plus the launch."""
        time_s = efficiency.combined(flops / self.peak_of(dtype), num_bytes / self.memory_bandwidth)
        return time_s * SECOND + self.launch_us(efficiency)

    def launch_us(self, efficiency: Efficiency) -> float:
        """Microseconds of a kernel that are independent of its work."""
        return self.launch_overhead_us if efficiency.launch_us is None else efficiency.launch_us


class Cost(NamedTuple):
    """Operations, bytes read and written, and microseconds of one node."""

    flops: int
    bytes: int
    time_us: float


def estimate(
    node: ExecutionNode, hardware: Hardware, env: Mapping[str, Dim] | None = None, memo: Memo | None = None
) -> Cost:
    """The cost of a node. `env` binds the sizes that are still symbolic: those of the step (KV, ...) and group sizes.

    The work of an op node follows from its formulas; that of a plain node from `attrs["flops"]` and `attrs["bytes"]`,
    by default 0 operations and the bytes of its inputs and outputs. A view costs nothing. The number of ranks of a
    collective is its attribute `W`, its `metadata["ranks"]`, or `env[group]`; the default is 2. A KV transfer uses the
    link of its `metadata["tier"]`, if that is not "device". Raises IRError naming the missing sizes.
    """
    env = env or {}
    if isinstance(node, OpNode) and node.is_view:
        return Cost(0, 0, 0.0)
    flops, num_bytes = (_number(node, work, env) for work in _work(node, env, memo))
    if node.op_type.is_comm:
        return Cost(flops, num_bytes, hardware.launch_overhead_us + _comm_us(node, hardware, env))
    is_transfer = node.op_type.is_kv or node.op_type.name == "WEIGHT_LOAD"
    if is_transfer and (link := _kv_link(node, hardware)) is not None:
        # Bytes moved count the read and the write; each byte crosses the link once.
        return Cost(flops, num_bytes, hardware.launch_overhead_us + link.time_us(num_bytes / 2))
    time_us = hardware.roofline_us(flops, num_bytes, dtype_of(node, hardware), efficiency_of(node, hardware))
    return Cost(flops, num_bytes, time_us)


def latency_us(node: ExecutionNode, hardware: Hardware, env: Mapping[str, Dim] | None = None) -> float:
    """Microseconds of a transfer that are independent of its size: the launch, and the steps over the link."""
    hops = max(_ranks(node, env or {}) - 1, 0)
    steps = {"COMM_ALLREDUCE": 2 * hops, "COMM_ALLGATHER": hops}.get(node.op_type.name, 1)
    return hardware.launch_overhead_us + hardware.link.time_us(0, steps)


def annotate(graph: ExecutionGraph, hardware: Hardware, env: Mapping[str, Dim] | None = None) -> None:
    """Sets `estimated_time_us` and `memory_bytes` (the bytes of the outputs) of every node, in place."""
    memo: Memo = {}
    for node in graph.nodes.values():
        node.estimated_time_us = estimate(node, hardware, env, memo).time_us
        node.memory_bytes = _number(node, _num_bytes(node.outputs), env or {})


def _work(node: ExecutionNode, env: Mapping[str, Dim], memo: Memo | None) -> tuple[Dim, Dim]:
    """Operations and bytes moved."""
    if isinstance(node, OpNode):
        return node.flops(env, memo), node.bytes_moved(env, memo)
    return _size_attr(node, "flops", 0), _size_attr(node, "bytes", _num_bytes([*node.inputs, *node.outputs]))


def _size_attr(node: ExecutionNode, name: str, default: Dim) -> Dim:
    value = node.attrs.get(name, default)
    if value is None or isinstance(value, (str, float, tuple)):
        raise IRError(f"{node.node_id}: attribute {name!r}: expected a size, got {value!r}")
    return value


def _num_bytes(refs: list[TensorRef]) -> Dim:
    total: Dim = 0
    for ref in refs:
        if ref.dtype not in DTYPES:
            raise IRError(f"{ref}: unknown element type, expected one of {', '.join(DTYPES)}")
        total = total + product(ref.shape) * DTYPES[ref.dtype]
    return total


def _number(node: ExecutionNode, size: Dim, env: Mapping[str, Dim]) -> int:
    value = evaluate(size, env)
    if not isinstance(value, int):
        raise IRError(f"{node.node_id}: the estimate requires {', '.join(sorted(free_symbols(value)))}")
    return value


def _comm_us(node: ExecutionNode, hardware: Hardware, env: Mapping[str, Dim]) -> float:
    refs = node.outputs or node.inputs
    if isinstance(node, OpNode):
        refs = refs[:1]  # a fused op communicates one tensor; its other outputs are local
    num_bytes = _number(node, _num_bytes(refs), env)
    hops = max(_ranks(node, env) - 1, 0)
    match node.op_type.name:
        case "COMM_ALLREDUCE":  # a reduce-scatter and an all-gather, each of (n - 1) / n of the data
            return hardware.link.time_us(2 * hops / (hops + 1) * num_bytes, 2 * hops)
        case "COMM_ALLGATHER":  # the output counts, of which a rank already has 1 / n
            return hardware.link.time_us(hops / (hops + 1) * num_bytes, hops)
    return hardware.link.time_us(num_bytes)


def _ranks(node: ExecutionNode, env: Mapping[str, Dim]) -> int:
    group = str(node.attrs.get("group", "tp"))
    ranks = node.attrs.get("W", node.metadata.get("ranks", env.get(group, 2)))
    return ranks if isinstance(ranks, int) else 2


def _kv_link(node: ExecutionNode, hardware: Hardware) -> Link | None:
    """The link that a transfer uses; None for one within the device, which is memory traffic of the roofline."""
    tier = node.metadata.get("tier", "device")
    if tier != "device":
        return hardware.disk_link or hardware.host_link if tier == "disk" else hardware.host_link
    return hardware.link if node.op_type.name == "KV_MIGRATE" else None


def dtype_of(node: ExecutionNode, hardware: Hardware) -> str:
    """The element type of the arithmetic: that of the first operand for which the device has a figure."""
    return next((ref.dtype for ref in [*node.inputs, *node.outputs] if ref.dtype in hardware.peak_flops), "")


def efficiency_of(node: ExecutionNode, hardware: Hardware) -> Efficiency:
    """The efficiency of a node's kernel on the device."""
    tags = sorted(node.tags) if isinstance(node, OpNode) else []  # sets are unordered
    for name in (node.op, *tags, node.op_type.name.lower(), "default"):
        if name in hardware.efficiency:
            return hardware.efficiency[name]
    return FULL
