"""Placement: splits the layers of a step into micro-batches, and moves blocks to other devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from sageLLM.runtime.core.cost import Hardware, estimate
from sageLLM.runtime.core.errors import TypeMismatch
from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.micro_batches import MicroBatches, entering, is_symbolic, share_of, why_not_divisible
from sageLLM.runtime.core.passes.order import part_by_part, reorder, replace_contents
from sageLLM.runtime.core.passes.rows import PART
from sageLLM.runtime.core.passes.transfers import move_nodes, ping_pong

PartTime = Callable[[ExecutionNode, int], float]
"""Microseconds of a node for a micro-batch with a number of rows."""


class PlacePass(DeclaredPass):
    """Runs the layers for a number of `micro_batches`, and the op types in `move` on other devices.

    With one device this is nano-batching (Zhu et al., NanoFlow, arXiv 2408.12757): the transfers of one micro-batch run
    while another one computes. With the feed-forwards on a separate device it is attention-FFN disaggregation with a
    ping-pong pipeline (Zhu et al., MegaScale-Infer, arXiv 2504.02263): with two or more micro-batches the attention
    device computes one while the FFN device computes another, and neither idles during the transfers.

    The rows that enter the layers are split by views of the op `split` and joined by `join` where they leave them.
    Every node of a layer is repeated per micro-batch, with `metadata["part"]`; the micro-batches alternate node by
    node, or at each transfer if nodes move; in a pipeline stage each goes through all layers before the next one, so
    that the next stage begins early. KV stores of one micro-batch precede the attention of the next. A value that
    another device reads is transferred once, by the ops `send` and `recv`; collectives run on the device of their
    operand.

    `part_time` returns the time of an old node for fewer rows. Without it ops take their roofline time on `hardware`,
    and blocks a time proportional to the rows, which is too short if reading the weights dominates. A graph with
    symbolic sizes has no times; the step decides which rows each micro-batch has. With bound sizes a hybrid step is not
    changed, as its rows belong to two phases.
    """

    micro_batches: int = 1
    move: ClassVar[Mapping[str, int]] = {}
    split: ClassVar[type[OpNode]]
    join: ClassVar[type[OpNode]]
    send: ClassVar[type[OpNode] | None] = None
    recv: ClassVar[type[OpNode] | None] = None

    def __init__(
        self,
        micro_batches: int | None = None,
        *,
        hardware: Hardware | None = None,
        sizes: Mapping[str, Dim] | None = None,
        part_time: PartTime | None = None,
    ) -> None:
        """`micro_batches` overrides the declared number; `sizes` binds the ranks of groups for collectives."""
        super().__init__()
        self.micro_batches = self.micro_batches if micro_batches is None else micro_batches
        self.hardware, self.sizes, self.part_time = hardware, sizes or {}, part_time

    def run(self, graph: ExecutionGraph) -> None:
        before = graph.estimate_total_time()
        if (reason := why_not_divisible(graph, self.micro_batches)) is not None:
            self.report.facts = {"skipped": reason}
            return
        try:
            result = self._split(graph)
        except TypeMismatch as error:
            self.report.facts = {"skipped": str(error)}
            return
        num_moved = self._move(result)
        if not is_symbolic(graph):
            self._set_times(graph, result)
        if self.move:
            ping_pong(result)
        elif any(node.op_type.name in ("COMM_SEND", "COMM_RECV") for node in graph.nodes.values()):
            reorder(result, part_by_part(result))  # a pipeline stage
        else:
            reorder(result)
        replace_contents(graph, result)
        after = graph.estimate_total_time()
        facts = {"micro_batches": self.micro_batches, "moved": num_moved}
        self.report.facts = {**facts, "us_before": before, "us_after": after}

    def _split(self, graph: ExecutionGraph) -> ExecutionGraph:
        if self.micro_batches == 1:
            return graph.copy()
        return MicroBatches(graph, self.micro_batches, self.split, self.join).build()

    def _move(self, graph: ExecutionGraph) -> int:
        if not self.move:
            return 0
        assert self.send is not None and self.recv is not None, "a pass that moves nodes must declare send and recv"
        return move_nodes(graph, self.move, self.send, self.recv)

    def _set_times(self, old: ExecutionGraph, new: ExecutionGraph) -> None:
        memo: Memo = {}
        rows = entering(old)[0].shape[0]
        for node in new.nodes.values():
            # Nodes that were only copied keep their times. The type is compared, too: the join of a value takes its
            # name, and so the id of the node that produced it.
            if type(old.nodes.get(node.node_id)) is not type(node):
                origin = old.nodes.get(node.origins[0]) if node.origins else None
                count = share_of(rows, node.metadata[PART], self.micro_batches) if origin else node.outputs[0].shape[0]
                node.estimated_time_us = self._time_us(node, origin, int(str(count)), memo)

    def _time_us(self, node: ExecutionNode, origin: ExecutionNode | None, num_rows: int, memo: Memo) -> float:
        if self.part_time is not None and origin is not None:
            return self.part_time(origin, num_rows)
        if isinstance(node, OpNode) and self.hardware is not None:
            is_received = node.op_type.name == "COMM_RECV"  # ends with the last byte of the send, which has the time
            return 0.0 if is_received else estimate(node, self.hardware, self.sizes, memo).time_us
        if origin is not None:
            return origin.estimated_time_us * _share(node, origin)
        return self.part_time(node, num_rows) if self.part_time is not None else 0.0


def _share(node: ExecutionNode, origin: ExecutionNode) -> float:
    """The fraction of its origin's rows that a node has."""
    part, whole = ((one.outputs or one.inputs)[0].shape[0] for one in (node, origin))
    assert isinstance(part, int) and isinstance(whole, int), "sizes are bound"
    return part / whole
