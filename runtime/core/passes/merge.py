"""Merging of independent collectives into one, which pays the latency once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import ClassVar

from sageLLM.runtime.core.cost import Hardware, estimate, latency_us
from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.reachability import Reachability
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.order import reorder, replace_contents
from sageLLM.runtime.core.passes.rows import PART, free_name, join_rows, new_node, split_rows


class MergePass(DeclaredPass):
    """Merges compatible nodes of the op types `select`, up to `limit_bytes`.

    Compatible nodes have equal attributes, group and ranks (attributes or metadata), dtype, device, stream and
    micro-batch. Only nodes that are independent by transitive reachability are merged, and no two merges form a cycle.
    The order of merging depends on the graph alone: ranks that merged differently would wait for each other forever.
    Sizes must be bound: a symbolic transfer is skipped.

    A merged plain node reads and writes the tensors of all its parts, in their order. An op takes one tensor: `join`
    concatenates the rows of all parts, and views by `split` recover those of each part. That requires `hardware`, and
    is done only where the copies cost less than the latencies that are saved.

    The estimated time is the sum of the parts' times less the saved latencies of the link; `sizes` binds the ranks of
    the groups, two by default. Without `hardware` the latency is derived from parts of different sizes. If merging
    would make the graph slower, because one part is ready late, nothing is merged.
    """

    select: ClassVar[frozenset[str]] = frozenset()
    limit_bytes: ClassVar[int] = 0
    join: ClassVar[type[OpNode] | None] = None
    split: ClassVar[type[OpNode] | None] = None

    def __init__(self, hardware: Hardware | None = None, sizes: Mapping[str, Dim] | None = None) -> None:
        super().__init__()
        self.hardware = hardware
        self.sizes = sizes or {}

    def run(self, graph: ExecutionGraph) -> None:
        time_before, num_merged = self._comm_us(graph), 0
        batches = self._batches(graph)
        if batches:
            # Merged on a copy: whether a late part delays the step shows only when all merges are done.
            trial = graph.copy()
            num_merged = sum(self._merge(trial, node_ids) for node_ids in batches)
            reorder(trial)
            if trial.estimate_total_time() > graph.estimate_total_time():
                num_merged = 0
            if num_merged:
                replace_contents(graph, trial)
        self.report.facts = {"merged": num_merged, "us_before": time_before, "us_after": self._comm_us(graph)}

    def _comm_us(self, graph: ExecutionGraph) -> float:
        return sum(node.estimated_time_us for node in graph.nodes.values() if node.op_type.name in self.select)

    def _compatible(self, graph: ExecutionGraph) -> list[list[str]]:
        """Groups of two or more nodes that one collective can serve, independent or not."""
        groups: dict[Hashable, list[str]] = {}
        for node in graph.topological_sort():
            if node.op_type.name in self.select and _num_bytes(node) is not None:
                phase = node.node_id in graph.prefill_nodes, node.node_id in graph.decode_nodes
                groups.setdefault((_kind(node), phase), []).append(node.node_id)
        return [node_ids for node_ids in groups.values() if len(node_ids) > 1]

    def _batches(self, graph: ExecutionGraph) -> list[list[str]]:
        """The nodes to merge: two or more compatible ones that depend neither on one another nor on other batches."""
        groups = self._compatible(graph)
        reach = Reachability(graph.topological_sort()) if groups else None
        batches: list[list[str]] = []
        for node_ids in groups:
            waiting = [graph.nodes[node_id] for node_id in node_ids]
            while waiting and reach is not None:
                batch, waiting = self._next_batch(waiting, reach)
                if len(batch) > 1:
                    batches.append([node.node_id for node in batch])
                    reach.tie(batches[-1])  # without it a later batch could both precede and follow this one
        return batches

    def _merge(self, graph: ExecutionGraph, node_ids: list[str]) -> int:
        parts = [graph.nodes[node_id] for node_id in node_ids]
        nodes = self._merged(graph, parts)
        if not nodes:
            return 0
        graph.replace(parts, nodes)
        return len(parts)

    def _next_batch(
        self, nodes: list[ExecutionNode], reach: Reachability
    ) -> tuple[list[ExecutionNode], list[ExecutionNode]]:
        """The first node with those that can be merged with it, within the byte limit; and the rest."""
        batch, rest, size = [nodes[0]], [], _size(nodes[0])
        inside, before = reach.bit[nodes[0].node_id], reach.before[nodes[0].node_id]
        for node in nodes[1:]:
            bit, waits = reach.bit[node.node_id], reach.before[node.node_id]
            is_independent = not (waits & inside or before & bit)
            if is_independent and size + _size(node) <= self.limit_bytes:
                batch.append(node)
                inside, before, size = inside | bit, before | waits, size + _size(node)
            else:
                rest.append(node)
        return batch, rest

    def _merged(self, graph: ExecutionGraph, parts: list[ExecutionNode]) -> list[ExecutionNode]:
        """The nodes that replace the parts; empty if that would not save time."""
        origins = tuple(dict.fromkeys(origin for node in parts for origin in (node.origins or (node.node_id,))))
        nodes = self._joined(graph, parts) if isinstance(parts[0], OpNode) else [self._plain(parts)]
        old_us, new_us = (sum(node.estimated_time_us for node in some) for some in (parts, nodes))
        if isinstance(parts[0], OpNode) and new_us >= old_us:
            return []
        layer_id = parts[0].layer_id if len({node.layer_id for node in parts}) == 1 else None
        for node in nodes:
            node.origins, node.layer_id = origins, layer_id
        return nodes

    def _plain(self, parts: list[ExecutionNode]) -> ExecutionNode:
        merged = parts[0].copy()
        merged.inputs = [ref for node in parts for ref in node.inputs]
        merged.outputs = [ref for node in parts for ref in node.outputs]
        merged.estimated_time_us = self._time_us(parts)
        merged.memory_bytes = sum(node.memory_bytes for node in parts)
        return merged

    def _joined(self, graph: ExecutionGraph, parts: list[ExecutionNode]) -> list[ExecutionNode]:
        first = parts[0]
        if not isinstance(first, OpNode) or self.join is None or self.split is None or self.hardware is None:
            return []
        if len(first.inputs) != 1 or len(first.inputs[0].shape) != 2:
            return []
        names = [free_name(graph, f"{first.node_id}.{word}") for word in ("joined", "sum")]
        joins = join_rows(self.join, first, [node.inputs[0] for node in parts], names[0])
        whole = new_node(type(first), first, joins[-1].outputs, names[1:], **first.attrs)
        splits = split_rows(self.split, first, whole.outputs[0], [node.outputs[0] for node in parts])
        whole.estimated_time_us = self._time_us(parts)
        for node in (*joins, *splits):
            node.estimated_time_us = estimate(node, self.hardware, self.sizes).time_us
        return [*joins, whole, *splits]

    def _time_us(self, parts: list[ExecutionNode]) -> float:
        times = [node.estimated_time_us for node in parts]
        saved = (len(parts) - 1) * min(self._latency_us(parts), *times)
        return max(sum(times) - saved, *times)  # a merged transfer is never faster than its largest part

    def _latency_us(self, parts: list[ExecutionNode]) -> float:
        """Microseconds of a transfer that are independent of its size."""
        if self.hardware is not None:
            return latency_us(parts[0], self.hardware, self.sizes)
        # Without a device: the intercept of the line through the smallest and the largest part.
        small, large = (pick(parts, key=_size) for pick in (min, max))
        if _size(small) == _size(large):
            return 0.0
        slope = (large.estimated_time_us - small.estimated_time_us) / (_size(large) - _size(small))
        return max(0.0, small.estimated_time_us - max(slope, 0.0) * _size(small))


def _kind(node: ExecutionNode) -> Hashable:
    """A key that is equal for nodes that one collective can serve."""
    attrs = tuple(sorted((name, str(value)) for name, value in node.attrs.items()))
    peers = tuple(str(node.metadata.get(key)) for key in ("group", "ranks", PART))
    types = frozenset(ref.dtype for ref in node.inputs)
    widths = tuple(ref.shape[1:] for ref in node.inputs) if isinstance(node, OpNode) else ()
    return type(node), node.op_type, node.op, attrs, peers, types, widths, node.device_id, node.stream_id


def _size(node: ExecutionNode) -> int:
    return _num_bytes(node) or 0


def _num_bytes(node: ExecutionNode) -> int | None:
    """The bytes that a rank contributes, or None while a size is symbolic."""
    if not all(ref.is_bound for ref in node.inputs):
        return None
    return sum(ref.num_bytes for ref in node.inputs)
