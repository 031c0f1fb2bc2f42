"""Merges collectives that do not wait for one another into one, which pays the latency once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.core.graph import ExecutionGraph
from sageLLM.runtime.core.ir import ExecutionNode, OpNode
from sageLLM.runtime.core.passes.order import Reachability, put_in_order
from sageLLM.runtime.core.rewrite import DeclaredPass


class MergePass(DeclaredPass):
    """Merges plain nodes of the op types `select` that are alike, up to `limit_bytes`.

    Alike are nodes with equal attributes, group and ranks (also where the metadata give them), dtype, device and
    stream. Op nodes stay as they are, since no kernel takes the operands of several.

    Only nodes that are independent by transitive reachability are merged, and no merge closes a circle with another
    one. The merged node reads and writes the tensors of all its parts, in their order; the order of merging follows
    from the graph alone, so every rank merges alike. Sizes must be bound: a symbolic transfer is left as it is.

    The estimated time is the sum of the parts' times less the latencies that are saved. These follow from parts of
    different sizes; for equal ones the latency of `hardware` is taken, and without it nothing.
    """

    select: ClassVar[frozenset[str]] = frozenset()
    limit_bytes: ClassVar[int] = 0

    def __init__(self, hardware: Hardware | None = None) -> None:
        super().__init__()
        self.hardware = hardware

    def run(self, graph: ExecutionGraph) -> None:
        time_before = sum(node.estimated_time_us for node in graph.nodes.values() if node.op_type.name in self.select)
        reach = Reachability(graph)
        num_merged = 0
        for candidates in self._alike(graph):
            for batch in self._batches(candidates, reach):
                num_merged += len(batch)
                graph.replace(batch, [self._merged(batch)])
        put_in_order(graph)
        time_after = sum(node.estimated_time_us for node in graph.nodes.values() if node.op_type.name in self.select)
        self.report.facts = {"merged": num_merged, "us_before": time_before, "us_after": time_after}

    def _alike(self, graph: ExecutionGraph) -> list[list[ExecutionNode]]:
        groups: dict[Hashable, list[ExecutionNode]] = {}
        for node in graph.topological_sort():
            is_plain = node.op_type.name in self.select and not isinstance(node, OpNode)
            if is_plain and _num_bytes(node) is not None:
                dtypes = frozenset(ref.dtype for ref in node.inputs)
                phase = node.node_id in graph.prefill_nodes, node.node_id in graph.decode_nodes
                attrs = tuple(sorted((name, str(value)) for name, value in node.attrs.items()))
                peers = str(node.metadata.get("group")), str(node.metadata.get("ranks"))
                key = (node.op_type, node.op, attrs, peers, dtypes, node.device_id, node.stream_id, phase)
                groups.setdefault(key, []).append(node)
        return list(groups.values())

    def _batches(self, candidates: list[ExecutionNode], reach: Reachability) -> list[list[ExecutionNode]]:
        """Sets of two or more independent nodes, each as large as the limit lets it be, first come first served."""
        batches: list[list[ExecutionNode]] = []
        sizes = {node.node_id: _size(node) for node in candidates}
        waiting = candidates
        while waiting:
            batch, rest = [waiting[0]], []
            size = sizes[waiting[0].node_id]
            for node in waiting[1:]:
                more = sizes[node.node_id]
                fits = size + more <= self.limit_bytes
                if fits and all(reach.are_independent(node.node_id, other.node_id) for other in batch):
                    batch.append(node)
                    size += more
                else:
                    rest.append(node)
            if len(batch) > 1:
                reach.tie([node.node_id for node in batch])
                batches.append(batch)
            waiting = rest
        return batches

    def _merged(self, parts: list[ExecutionNode]) -> ExecutionNode:
        first = parts[0]
        origins = dict.fromkeys(origin for node in parts for origin in (node.origins or (node.node_id,)))
        return ExecutionNode(
            first.node_id,
            first.op_type,
            [ref for node in parts for ref in node.inputs],
            [ref for node in parts for ref in node.outputs],
            device_id=first.device_id,
            stream_id=first.stream_id,
            estimated_time_us=self._time_us(parts),
            memory_bytes=sum(node.memory_bytes for node in parts),
            layer_id=first.layer_id if len({node.layer_id for node in parts}) == 1 else None,
            metadata={**first.metadata, "op": first.op},
            attrs=dict(first.attrs),
            block=first.block,
            origins=tuple(origins),
        )

    def _time_us(self, parts: list[ExecutionNode]) -> float:
        times = [node.estimated_time_us for node in parts]
        saved = (len(parts) - 1) * min(self._latency_us(parts), *times)
        return max(sum(times) - saved, *times)

    def _latency_us(self, parts: list[ExecutionNode]) -> float:
        """The part of a transfer's time that does not grow with its size."""
        small, large = (pick(parts, key=_size) for pick in (min, max))
        if _size(small) < _size(large):
            slope = (large.estimated_time_us - small.estimated_time_us) / (_size(large) - _size(small))
            return max(0.0, small.estimated_time_us - max(slope, 0.0) * _size(small))
        if self.hardware is None:
            return 0.0
        return self.hardware.launch_overhead_us + 2 * self.hardware.link.latency_us  # a ring of two has two steps


def _size(node: ExecutionNode) -> int:
    return _num_bytes(node) or 0


def _num_bytes(node: ExecutionNode) -> int | None:
    """The bytes that a rank gives, or None while a size is symbolic."""
    if not all(isinstance(size, int) for ref in node.inputs for size in ref.shape):
        return None
    return sum(ref.num_bytes for ref in node.inputs)
