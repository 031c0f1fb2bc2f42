"""Cuts the layers of a step into micro-batches, and moves blocks of them to other devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from sageLLM.runtime.core.cost import Hardware, Memo, estimate
from sageLLM.runtime.core.errors import TypeMismatch
from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import Inference, InferKey, OpNode
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.passes.micro_batches import MicroBatches, entering, share_of, why_not_divisible
from sageLLM.runtime.core.passes.order import put_in_order, take_over
from sageLLM.runtime.core.passes.rows import PART
from sageLLM.runtime.core.passes.transfers import move_nodes

PartTime = Callable[[ExecutionNode, int], float]
"""The microseconds of a node for a micro-batch of so many rows."""


class PlacePass(DeclaredPass):
    """Runs the layers for `parts` micro-batches, and the op types that `move` names on other devices.

    With one device this is nano-batching (Zhu et al., NanoFlow, arXiv 2408.12757): while one micro-batch computes, the
    transfers of another one run. With feed-forwards on a device of their own it is attention-FFN disaggregation with a
    ping-pong pipeline (Zhu et al., MegaScale-Infer, arXiv 2504.02263).

    The rows that enter the layers are cut by views of the op `split`, and put after one another by `join` where they
    leave them. Every node of a layer is there once per micro-batch, in turn, with `metadata["part"]`. What stores keys
    and values of one micro-batch comes before what reads the cache for the next. A value that another device needs goes
    there by the ops `send` and `recv`, once; collectives run where their operand is made.

    `part_time` gives the time of an old node for fewer rows. Without it ops take what the roofline of `hardware` says,
    and blocks a time in proportion to the rows, which is too short where weights dominate. Sizes must be bound, and a
    hybrid step is left as it is: its rows belong to two phases.
    """

    parts: int = 1
    move: ClassVar[Mapping[str, int]] = {}
    split: ClassVar[type[OpNode]]
    join: ClassVar[type[OpNode]]
    send: ClassVar[type[OpNode] | None] = None
    recv: ClassVar[type[OpNode] | None] = None

    def __init__(
        self,
        parts: int | None = None,
        *,
        hardware: Hardware | None = None,
        sizes: Mapping[str, Dim] | None = None,
        part_time: PartTime | None = None,
    ) -> None:
        """`parts` other than declared; `sizes` gives the ranks of the groups, for the times of collectives."""
        super().__init__()
        self.parts = self.parts if parts is None else parts
        self.hardware, self.sizes, self.part_time = hardware, sizes or {}, part_time

    def run(self, graph: ExecutionGraph) -> None:
        before = graph.estimate_total_time()
        if (reason := why_not_divisible(graph, self.parts)) is not None:
            self.report.facts = {"left": reason}
            return
        try:
            result = MicroBatches(graph, self.parts, self.split, self.join).build() if self.parts > 1 else graph.copy()
        except TypeMismatch as error:
            self.report.facts = {"left": str(error)}
            return
        num_moved = self._move(result)
        self._set_times(graph, result)
        put_in_order(result)
        take_over(graph, result)
        after = graph.estimate_total_time()
        self.report.facts = {"parts": self.parts, "moved": num_moved, "us_before": before, "us_after": after}

    def _move(self, graph: ExecutionGraph) -> int:
        if not self.move:
            return 0
        assert self.send is not None and self.recv is not None, "a pass that moves has ops to send and to receive"
        return move_nodes(graph, self.move, self.send, self.recv)

    def _set_times(self, old: ExecutionGraph, new: ExecutionGraph) -> None:
        memo: dict[InferKey, Inference] = {}
        rows = entering(old)[0].shape[0]
        for node in new.nodes.values():
            if type(old.nodes.get(node.node_id)) is not type(node):  # a joined value keeps its name, not its op
                origin = old.nodes.get(node.origins[0]) if node.origins else None
                count = share_of(rows, node.metadata[PART], self.parts) if origin else node.outputs[0].shape[0]
                node.estimated_time_us = self._time_us(node, origin, int(str(count)), memo)

    def _time_us(self, node: ExecutionNode, origin: ExecutionNode | None, num_rows: int, memo: Memo) -> float:
        if self.part_time is not None and origin is not None:
            return self.part_time(origin, num_rows)
        if isinstance(node, OpNode) and self.hardware is not None:
            is_received = node.op_type.name == "COMM_RECV"  # with the last byte sent
            return 0.0 if is_received else estimate(node, self.hardware, self.sizes, memo).time_us
        if origin is not None:
            return origin.estimated_time_us * _share(node, origin)
        return self.part_time(node, num_rows) if self.part_time is not None else 0.0


def _share(node: ExecutionNode, origin: ExecutionNode) -> float:
    """How much of its origin's rows a node has."""
    part, whole = ((one.outputs or one.inputs)[0].shape[0] for one in (node, origin))
    assert isinstance(part, int) and isinstance(whole, int), "sizes are bound"
    return part / whole
