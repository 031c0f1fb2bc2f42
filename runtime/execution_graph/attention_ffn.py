"""The two sides of attention-FFN disaggregation: the part of a step that an attention worker runs, and the FFN's part.

The gate of experts is part of the FFN: a row is sent once, however many experts it selects, and attention workers have
no weights of the feed-forward at all.

Several FFN workers may divide the weights, or the experts, of each feed-forward, as tensor-parallel ranks do. Each gets
all rows of a micro-batch, and the attention worker adds what they return, so FFN workers do not depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from sageLLM.generated.ops import Add, AllReduce, Recv, Send
from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes.place import AfDisaggregation
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.passes.rows import PART
from sageLLM.runtime.errors import SageError

Role: TypeAlias = Literal["attention", "ffn"]
DEVICE_OF: dict[Role, int] = {"attention": 0, "ffn": AfDisaggregation.move["FFN"]}


@dataclass(frozen=True, slots=True)
class Side:
    """The role of a worker, its rank among those of the role, and the number of workers of the other role.

    `width` FFN workers with consecutive ranks divide each feed-forward: a group. The micro-batches of all attention
    workers go to the groups in turns, so that these have equal shares also where there are fewer or more of them, or a
    number that does not divide.
    """

    role: Role
    rank: int
    num_peers: int
    width: int = 1

    @property
    def share(self) -> int:
        """The rank of an FFN worker in its group."""
        return self.rank % self.width

    def peers(self, part: int, num_ubatches: int) -> range:
        """The FFN workers of a micro-batch of an attention worker."""
        group = (self.rank * num_ubatches + part) % (self.num_peers // self.width)
        return range(group * self.width, (group + 1) * self.width)


class ReceiveBuffer(NamedTuple):
    """An input for the rows of a micro-batch from a peer."""

    ref: TensorRef
    part: int
    peer: int


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


def drop_reductions(graph: ExecutionGraph) -> None:
    """Removes the sums over ranks from a block graph: an FFN worker returns its part of the sum."""
    for node in list(graph.nodes.values()):
        if isinstance(node, AllReduce):
            graph.replace([node], [], renames={node.outputs[0].name: node.inputs[0]})


def side_graph(graph: ExecutionGraph, side: Side, num_ubatches: int) -> ExecutionGraph:
    """One side of a disaggregated kernel graph, on one device and stream, in the order of the whole graph.

    The buffers of its receives are inputs (`receive_buffers`). The FFN's side returns nothing, and has peer 0; see
    `with_peer`.
    """
    device = DEVICE_OF[side.role]
    order = [node for node in graph.topological_sort() if node.device_id == device]
    result = graph.get_subgraph(node.node_id for node in order)
    _order_receives(graph, result, device)
    if side.role == "ffn" and any(node.op_type.is_comm for node in result.nodes.values() if not _is_transfer(node)):
        raise SageError("af must have one FFN worker per group: the feed-forward of this model adds over ranks inside")
    result.outputs = list(graph.outputs) if side.role == "attention" else []
    for node in result.nodes.values():
        node.device_id = node.stream_id = 0
        node.inputs = [replace(ref, device_id=0) for ref in node.inputs]
        node.outputs = [replace(ref, device_id=0) for ref in node.outputs]
        if _is_transfer(node):
            node.attrs["peer"] = side.peers(part_of(node), num_ubatches)[0] if side.role == "attention" else 0
    if side.role == "attention" and side.width > 1:
        for node in [node for node in result.nodes.values() if _is_transfer(node)]:
            _exchange_with_all(result, node, side.width)
    result.inputs = {
        **{name: replace(ref, device_id=0) for name, ref in graph.inputs.items() if name in result.inputs},
        **{buffer.ref.name: buffer.ref for buffer in receive_buffers(result)},
    }
    result.weights = {name: replace(ref, device_id=0) for name, ref in result.weights.items()}
    result.reindex()
    return result


def _is_transfer(node: ExecutionNode) -> bool:
    return isinstance(node, Send | Recv)


def _exchange_with_all(graph: ExecutionGraph, node: ExecutionNode, width: int) -> None:
    """Sends to all workers of a group, or adds what all of them return, instead of an exchange with the first."""
    copies = []
    for share in range(width):
        one = node.copy()
        one.node_id = node.node_id if share == 0 else f"{node.node_id}.w{share}"
        one.attrs["peer"] = peer_of(node) + share
        one.outputs = [replace(ref, name=f"{ref.name}.w{share}") for ref in node.outputs]
        if isinstance(node, Recv):
            one.inputs = [replace(ref, name=f"{ref.name}.w{share}") for ref in node.inputs]
            graph.inputs |= {ref.name: ref for ref in one.inputs}
        copies.append(one)
    if isinstance(node, Send):
        graph.replace([node], copies)
        return
    (total,), (result,), adds = copies[0].outputs, node.outputs, list[ExecutionNode]()
    for share, one in enumerate(copies[1:], start=1):
        partial = result if share == width - 1 else replace(result, name=f"{result.name}.sum{share}")
        adds.append(Add(f"{node.node_id}.add{share}", Add.kind, [total, one.outputs[0]], [partial]))
        adds[-1].layer_id, adds[-1].metadata = node.layer_id, dict(node.metadata)
        total = partial
    graph.replace([node], [*copies, *adds])


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


def peer_of(node: ExecutionNode) -> int:
    """The worker at the other end of a transfer."""
    peer = node.attrs["peer"]
    assert isinstance(peer, int), "peers are numbers"
    return peer


def receive_buffers(graph: ExecutionGraph) -> list[ReceiveBuffer]:
    """The inputs that are buffers of receives."""
    receives = [node for node in graph.nodes.values() if isinstance(node, Recv)]
    return [ReceiveBuffer(node.inputs[0], part_of(node), peer_of(node)) for node in receives]


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
