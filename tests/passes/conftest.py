"""Random block-like graphs, and the properties that passes must preserve."""

from __future__ import annotations

from hypothesis import strategies as st

from sageLLM.generated.ops.op_types import OpType
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.verify import verify

KINDS = [
    OpType.PREFILL_ATTN,
    OpType.FFN,
    OpType.LAYERNORM,
    OpType.COMM_ALLREDUCE,
    OpType.COMM_ALLREDUCE,
    OpType.KV_STORE,
]


@st.composite
def block_graphs(draw: st.DrawFn, max_nodes: int = 24) -> ExecutionGraph:
    """A graph of plain nodes: each reads one to three earlier values; sizes, times and layers are random."""
    graph = ExecutionGraph("random", inputs={"x": TensorRef("x", (4, 8), "f32")})
    values = [graph.inputs["x"]]
    for i in range(draw(st.integers(1, max_nodes))):
        kind = draw(st.sampled_from(KINDS))
        count = 1 if kind is OpType.COMM_ALLREDUCE else draw(st.integers(1, 3))
        inputs = list(dict.fromkeys(draw(st.sampled_from(values)) for _ in range(count)))
        shape = inputs[0].shape if kind is OpType.COMM_ALLREDUCE else (draw(st.integers(1, 40)), 8)
        outputs = [TensorRef(f"v{i}", shape, "f32")]
        time_us = float(draw(st.integers(0, 9)))
        attrs = {"group": draw(st.sampled_from(["tp", "dp"]))} if kind is OpType.COMM_ALLREDUCE else {}
        node = ExecutionNode(
            f"n{i}", kind, inputs, outputs, estimated_time_us=time_us, attrs=dict(attrs), layer_id=i // 4
        )
        graph.add_node(node)
        values += outputs
    graph.outputs = [values[-1]]
    verify(graph)
    return graph


def ancestors(graph: ExecutionGraph) -> dict[str, set[str]]:
    """For every value the values that it comes from, by plain search: an oracle for reachability."""
    found: dict[str, set[str]] = {name: set() for name in [*graph.inputs, *graph.weights]}
    for node in graph.topological_sort():
        sources = {ref.name for ref in node.inputs}.union(*(found[ref.name] for ref in node.inputs))
        found |= {ref.name: sources for ref in node.outputs}
    return found


def made(graph: ExecutionGraph) -> list[str]:
    """The names of all values that nodes make, as often as they are made."""
    return sorted(ref.name for node in graph.nodes.values() for ref in node.outputs)
