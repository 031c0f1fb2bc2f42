"""Estimates of time and memory traffic: a roofline for kernels, ring formulas for collectives, links for transfers.

A kernel takes as long as the slower of its arithmetic and its memory traffic, plus a launch (the roofline model of
Williams, Waterman and Patterson, CACM 52(4), 2009). A ring all-reduce over n ranks sends 2 (n - 1) / n of the data
over each link in 2 (n - 1) steps; an all-gather half of that (Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.dims import Dim, evaluate, free_symbols, product
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Inference, InferKey, OpNode
from sageLLM.runtime.core.ir.types import DTYPES

Memo = MutableMapping[InferKey, Inference]
SECOND = 1e6  # microseconds


@dataclass(frozen=True, slots=True)
class Link:
    """A connection: bytes per second in one direction, and microseconds until the first byte arrives."""

    bandwidth: float
    latency_us: float

    def time_us(self, num_bytes: float, steps: int = 1) -> float:
        """Microseconds to send so many bytes in so many steps that wait for each other."""
        return num_bytes / self.bandwidth * SECOND + steps * self.latency_us


@dataclass(frozen=True, slots=True)
class Hardware:
    """The limits of one device.

    `peak_flops` is in operations per second by dtype, `memory_bandwidth` in bytes per second. `link` joins devices,
    `host_link` leads to host memory (the KV tiers). `efficiency` is the share of the limit that an op reaches, by op
    name, op type in lower case, or tag; what it does not name reaches all of it.
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    memory_bytes: int
    launch_overhead_us: float
    link: Link
    host_link: Link
    efficiency: Mapping[str, float] = field(default_factory=dict)

    def peak_of(self, dtype: str) -> float:
        """Operations per second; the slowest known arithmetic stands in for a dtype without a figure."""
        return self.peak_flops.get(dtype) or min(self.peak_flops.values())

    def roofline_us(self, flops: int, num_bytes: int, dtype: str, efficiency: float = 1.0) -> float:
        """Microseconds of a kernel."""
        limit = max(flops / self.peak_of(dtype), num_bytes / self.memory_bandwidth)
        return limit / efficiency * SECOND + self.launch_overhead_us


class Cost(NamedTuple):
    """Operations, bytes read and written, and microseconds of one node."""

    flops: int
    bytes: int
    time_us: float


def estimate(
    node: ExecutionNode, hardware: Hardware, env: Mapping[str, Dim] | None = None, memo: Memo | None = None
) -> Cost:
    """The cost of a node. env gives the sizes that are still symbolic, those of the step (KV, ...) and of the groups.

    An op node's work comes from its formulas; a plain node's from `attrs["flops"]` and `attrs["bytes"]` where given,
    else it moves its inputs and outputs. A view costs nothing. The ranks of a collective are its attribute `W`, its
    `metadata["ranks"]`, or env's value for its group, and two if nothing says more. A KV transfer uses the host link
    if `metadata["tier"]` is not "device". Raises IRError naming the sizes that are missing.
    """
    env = env or {}
    if isinstance(node, OpNode) and node.is_view:
        return Cost(0, 0, 0.0)
    flops, num_bytes = (_number(node, work, env) for work in _work(node, env, memo))
    if node.op_type.is_comm:
        return Cost(flops, num_bytes, hardware.launch_overhead_us + _comm_us(node, hardware, env))
    if node.op_type.is_kv and (link := _kv_link(node, hardware)) is not None:
        return Cost(flops, num_bytes, hardware.launch_overhead_us + link.time_us(num_bytes / 2))
    time_us = hardware.roofline_us(flops, num_bytes, _dtype(node, hardware), _efficiency(node, hardware))
    return Cost(flops, num_bytes, time_us)


def reach(node: ExecutionNode, hardware: Hardware) -> tuple[float, float]:
    """The operations and the bytes per second that a kernel gets out of the device, at its efficiency."""
    peak = hardware.peak_of(_dtype(node, hardware))
    efficiency = _efficiency(node, hardware)
    return peak * efficiency, hardware.memory_bandwidth * efficiency


def latency_us(node: ExecutionNode, hardware: Hardware, env: Mapping[str, Dim] | None = None) -> float:
    """The part of a transfer's time that does not grow with its size: the launch, and the steps over the link."""
    hops = max(_ranks(node, env or {}) - 1, 0)
    steps = {"COMM_ALLREDUCE": 2 * hops, "COMM_ALLGATHER": hops}.get(node.op_type.name, 1)
    return hardware.launch_overhead_us + hardware.link.time_us(0, steps)


def annotate(graph: ExecutionGraph, hardware: Hardware, env: Mapping[str, Dim] | None = None) -> None:
    """Fill in `estimated_time_us` and `memory_bytes` (the bytes of the outputs) of every node, in place."""
    memo: dict[InferKey, Inference] = {}
    for node in graph.nodes.values():
        node.estimated_time_us = estimate(node, hardware, env, memo).time_us
        node.memory_bytes = _number(node, _num_bytes(node.outputs), env or {})


def _work(node: ExecutionNode, env: Mapping[str, Dim], memo: Memo | None) -> tuple[Dim, Dim]:
    """Flops and bytes moved."""
    if isinstance(node, OpNode):
        return node.flops(env, memo), node.bytes_moved(env, memo)
    return _given(node, "flops", 0), _given(node, "bytes", _num_bytes([*node.inputs, *node.outputs]))


def _given(node: ExecutionNode, name: str, default: Dim) -> Dim:
    value = node.attrs.get(name, default)
    if value is None or isinstance(value, (str, float, tuple)):
        raise IRError(f"{node.node_id}: attribute {name!r} is {value!r}, want a size")
    return value


def _num_bytes(refs: list[TensorRef]) -> Dim:
    total: Dim = 0
    for ref in refs:
        if ref.dtype not in DTYPES:
            raise IRError(f"{ref} has an unknown element type, want one of {', '.join(DTYPES)}")
        total = total + product(ref.shape) * DTYPES[ref.dtype]
    return total


def _number(node: ExecutionNode, size: Dim, env: Mapping[str, Dim]) -> int:
    value = evaluate(size, env)
    if not isinstance(value, int):
        raise IRError(f"{node.node_id}: no estimate without {', '.join(sorted(free_symbols(value)))}")
    return value


def _comm_us(node: ExecutionNode, hardware: Hardware, env: Mapping[str, Dim]) -> float:
    refs = node.outputs or node.inputs
    num_bytes = _number(node, _num_bytes(refs), env)
    hops = max(_ranks(node, env) - 1, 0)
    match node.op_type.name:
        case "COMM_ALLREDUCE":
            return hardware.link.time_us(2 * hops / (hops + 1) * num_bytes, 2 * hops)
        case "COMM_ALLGATHER":
            return hardware.link.time_us(hops / (hops + 1) * num_bytes, hops)
    return hardware.link.time_us(num_bytes)


def _ranks(node: ExecutionNode, env: Mapping[str, Dim]) -> int:
    group = str(node.attrs.get("group", "tp"))
    ranks = node.attrs.get("W", node.metadata.get("ranks", env.get(group, 2)))
    return ranks if isinstance(ranks, int) else 2


def _kv_link(node: ExecutionNode, hardware: Hardware) -> Link | None:
    if node.metadata.get("tier", "device") != "device":
        return hardware.host_link
    return hardware.link if node.op_type.name == "KV_MIGRATE" else None


def _dtype(node: ExecutionNode, hardware: Hardware) -> str:
    """The element type that the arithmetic runs in: that of the first operand for which the device has a figure."""
    return next((ref.dtype for ref in [*node.inputs, *node.outputs] if ref.dtype in hardware.peak_flops), "")


def _efficiency(node: ExecutionNode, hardware: Hardware) -> float:
    tags = sorted(node.tags) if isinstance(node, OpNode) else []
    for name in (node.op, node.op_type.name.lower(), *tags):
        if name in hardware.efficiency:
            return hardware.efficiency[name]
    return 1.0
