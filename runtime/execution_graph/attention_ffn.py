"""The two sides of attention-FFN disaggregation: the part of a step that an attention worker runs, and the FFN's part.

The gate of experts is part of the FFN: a row is sent once, however many experts it selects, and attention workers have
no weights of the feed-forward at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sageLLM.generated.ops import Recv, Send
from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes.place import AfDisaggregation
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.passes.rows import PART

Role: TypeAlias = Literal["attention", "ffn"]
DEVICE_OF: dict[Role, int] = {"attention": 0, "ffn": AfDisaggregation.move["FFN"]}


@dataclass(frozen=True, slots=True)
class Side:
    """The role of a worker, its rank among those of the role, and the number of workers of the other role.

    The micro-batches of all attention workers go to the FFN workers in turns, so that these have equal shares also
    where there are fewer or more of them, or a number that does not divide.
    """

    role: Role
    rank: int
    num_peers: int

    def peer(self, part: int, num_ubatches: int) -> int:
        """The FFN worker of a micro-batch of an attention worker."""
        return (self.rank * num_ubatches + part) % self.num_peers


def is_ffn_weight(layout: ModelLayout, name: str) -> bool:
    """Whether a weight, such as `layers.3.ffn.wgu`, belongs to the FFN workers."""
    folder, _, rest = name.partition(".")
    block = layout.blocks.get(rest.split(".")[1]) if folder == "layers" and rest.count(".") > 1 else None
    return block is not None and OpType.FFN in block.op_type.values()


def disaggregate(graph: ExecutionGraph, num_ubatches: int) -> None:
    """Splits a block graph into micro-batches, and moves the feed-forwards to the device of the FFN workers."""
    placed = AfDisaggregation(num_ubatches)
    placed.transform(graph)
    assert "skipped" not in placed.report.facts, f"{graph.graph_id}: {placed.report.facts['skipped']}"


def side_graph(graph: ExecutionGraph, side: Side, num_ubatches: int) -> ExecutionGraph:
    """One side of a disaggregated kernel graph, on one device and stream, in the order of the whole graph.

    The buffers of its receives are inputs (`receive_buffers`). The FFN's side returns nothing, and has peer 0; see
    `with_peer`.
    """
    device = DEVICE_OF[side.role]
    order = [node for node in graph.topological_sort() if node.device_id == device]
    result = graph.get_subgraph(node.node_id for node in order)
    _order_receives(graph, result, device)
    result.outputs = list(graph.outputs) if side.role == "attention" else []
    for node in result.nodes.values():
        node.device_id = node.stream_id = 0
        node.inputs = [replace(ref, device_id=0) for ref in node.inputs]
        node.outputs = [replace(ref, device_id=0) for ref in node.outputs]
        if isinstance(node, Send | Recv):
            node.attrs["peer"] = side.peer(part_of(node), num_ubatches) if side.role == "attention" else 0
    result.inputs = {
        **{name: replace(ref, device_id=0) for name, ref in graph.inputs.items() if name in result.inputs},
        **{ref.name: ref for ref, _ in receive_buffers(result)},
    }
    result.weights = {name: replace(ref, device_id=0) for name, ref in result.weights.items()}
    result.reindex()
    return result


def with_peer(graph: ExecutionGraph, peer: int) -> ExecutionGraph:
    """A copy of an FFN's graph that receives from one attention worker and sends to it."""
    result = graph.copy()
    for node in result.nodes.values():
        if isinstance(node, Send | Recv):
            node.attrs["peer"] = peer
    return result


def part_of(node: ExecutionNode) -> int:
    """The number of the node's micro-batch; 0 in a graph that is not split."""
    return int(node.metadata.get(PART, 0))


def receive_buffers(graph: ExecutionGraph) -> list[tuple[TensorRef, int]]:
    """The inputs that are buffers of receives, each with the number of its micro-batch."""
    return [(node.inputs[0], part_of(node)) for node in graph.nodes.values() if isinstance(node, Recv)]


def _order_receives(whole: ExecutionGraph, side: ExecutionGraph, device: int) -> None:
    """Adds edges from the sends to the receives that depend on them by way of the other side."""
    sends: dict[str, set[str]] = {}  # node of the other side -> the sends of this side that it depends on
    for node in whole.topological_sort():
        found: set[str] = set()
        for before in node.dependencies:
            is_send = before in side.nodes and isinstance(side.nodes[before], Send)
            found |= {before} if is_send else sends.get(before, set())
        if node.device_id != device:
            sends[node.node_id] = found
        elif isinstance(node, Recv):
            for before in found:
                side.add_edge(before, node.node_id)
