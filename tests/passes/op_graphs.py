"""Random graphs of real ops, run by the executor or inside the arena of a memory plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st

from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.generated.ops.activation import SiluMul
from sageLLM.generated.ops.comm import AllReduce
from sageLLM.generated.ops.elementwise import Add, Scale
from sageLLM.generated.ops.norm import FusedAddRmsNorm
from sageLLM.generated.ops.views import ConcatLast, ConcatRows, SplitHalves, SplitRows
from sageLLM.runtime.core.ir.dims import Dim, evaluate
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.order import lane
from sageLLM.runtime.core.ir.verify import same_memory, verify
from sageLLM.runtime.core.passes.events import WAITS
from sageLLM.runtime.core.passes.memory import MemoryPlan
from sageLLM.runtime.core.passes.rows import new_node
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.kernels.cpu.callables import TORCH_DTYPES

Kernels = Mapping[str, Callable[..., Any]]
TWO_RANKS: Kernels = KERNELS | {"all_reduce": lambda x, *, group="tp": 2 * x}
"""The reference kernels, with a collective as two ranks that hold the same would see it."""
ROWS, WIDTH = 4, 8


@st.composite
def op_graphs(draw: st.DrawFn, max_nodes: int = 16, num_streams: int = 1, dtype: str = "f64") -> ExecutionGraph:
    """A valid kernel graph over rows, with views, in-place ops and all-reduces.

    Times are random, and streams but for the all-reduces, which have one.
    """
    x, w = TensorRef("x", (ROWS, WIDTH), dtype), TensorRef("w", (WIDTH,), dtype)
    graph = ExecutionGraph("random", level="kernel", inputs={"x": x}, weights={"w": w})
    values = [x]
    for i in range(draw(st.integers(1, max_nodes))):
        node = _draw_node(draw, graph, values, f"v{i}")
        node.stream_id = 0 if node.op_type.is_comm else draw(st.integers(0, num_streams - 1))
        node.estimated_time_us = float(draw(st.integers(1, 9)))
        graph.add_node(node)
        gone = {name for o in node.inplace.values() for name in same_memory(graph, node.input(o).name)}
        values = [ref for ref in values if ref.name not in gone] + node.outputs
    wanted = [ref for ref in values if ref.name != "x"]
    graph.outputs = wanted[-1:] + [ref for ref in wanted[:-1] if not graph.users(ref)]
    verify(graph)
    return graph


def _draw_node(draw: st.DrawFn, graph: ExecutionGraph, values: list[TensorRef], name: str) -> OpNode:
    like = ExecutionNode(name, Add.kind, [], [])
    one, other = draw(st.sampled_from(values)), draw(st.sampled_from(values))
    rows, width = (int(str(size)) for size in one.shape)
    kind = draw(st.sampled_from(["add", "scale", "reduce", "reduce", "wide", "tall", "half", "gate", "cut", "norm"]))
    if kind == "reduce":
        return new_node(AllReduce, like, [one], [name], group=draw(st.sampled_from(["tp", "tp", "ep"])))
    if kind == "wide" and width == WIDTH and one.shape == other.shape:
        return new_node(ConcatLast, like, [one, other], [name])
    if kind == "tall" and rows == ROWS // 2 and one.shape[1] == other.shape[1]:
        return new_node(ConcatRows, like, [one, other], [name])
    if kind == "half" and width == 2 * WIDTH:
        return new_node(SplitHalves, like, [one], [name, f"{name}_b"])
    if kind == "gate" and width == 2 * WIDTH:
        return new_node(SiluMul, like, [one], [name])
    if kind == "cut" and rows == ROWS:
        return new_node(SplitRows, like, [one], [name, f"{name}_b"], Ta=ROWS // 2)
    is_fresh = not any(graph.users(alias) for alias in same_memory(graph, other.name)) and other.name != "x"
    is_apart = one.name not in same_memory(graph, other.name)
    if kind == "norm" and one.shape == other.shape and width == WIDTH and is_fresh and is_apart:
        return new_node(FusedAddRmsNorm, like, [one, other, graph.weights["w"]], [name, f"{name}_h"])
    if kind == "add" and one.shape == other.shape:
        return new_node(Add, like, [one, other], [name])
    return new_node(Scale, like, [one], [name], factor=draw(st.sampled_from([0.5, -2.0])))


def random_values(graph: ExecutionGraph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs and weights of a graph with bound sizes."""
    generator = torch.Generator().manual_seed(seed)
    refs = sorted({**graph.inputs, **graph.weights}.items())
    types = {name: ([int(str(size)) for size in ref.shape], TORCH_DTYPES[ref.dtype]) for name, ref in refs}
    return {name: torch.rand(shape, generator=generator, dtype=dtype) for name, (shape, dtype) in types.items()}


def run(graph: ExecutionGraph, values: Mapping[str, torch.Tensor], kernels: Kernels = TWO_RANKS) -> list[torch.Tensor]:
    """The outputs of the graph, by the executor."""
    bound = {name: values[name] for name in graph.weights}
    return Plan(graph, kernels, bound).run({name: values.get(name) for name in graph.inputs})


def same_bits(results: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(results) == len(others) and all(map(torch.equal, results, others))


def random_order(graph: ExecutionGraph, random: Random) -> list[ExecutionNode]:
    """An order in which lanes may run: each in its own order, stopped by the noted waits alone."""
    queues: dict[tuple[int, int], list[ExecutionNode]] = {}
    for node in graph.topological_sort():
        queues.setdefault(lane(node), []).append(node)
    order: list[ExecutionNode] = []
    done: set[str] = set()
    while any(queues.values()):
        ready = [queue for queue in queues.values() if queue and done.issuperset(queue[0].metadata.get(WAITS, ()))]
        order.append(random.choice(ready).pop(0))
        done.add(order[-1].node_id)
    return order


class Arena:
    """Runs nodes with every value at its place, in memory full of NaN; a buffer is wiped after its last use."""

    def __init__(
        self, graph: ExecutionGraph, plan: MemoryPlan, values: Mapping[str, torch.Tensor], sizes: Mapping[str, Dim] = {}
    ) -> None:
        self.graph, self.plan, self.sizes = graph, plan, sizes
        self.bytes = torch.full((plan.peak_bytes,), 0xFF, dtype=torch.uint8)
        self.tensors: dict[str, torch.Tensor | None] = {name: value.clone() for name, value in values.items()}
        self.users_left = {b.names: sum(len(graph.users(name)) for name in b.names) for b in plan.buffers}
        self.buffer_of = {name: b for b in plan.buffers for name in b.names}

    def run(self, order: list[ExecutionNode], kernels: Kernels = TWO_RANKS) -> list[torch.Tensor]:
        for node in order:
            assert isinstance(node, OpNode)
            self._call(node, kernels)
            for name in {ref.name for ref in node.inputs}:
                self._read(name)
        return [self._tensor(ref.name).clone() for ref in self.graph.outputs]

    def _call(self, node: OpNode, kernels: Kernels) -> None:
        operands = [
            None if (r := node.optional_input(n)) is None else self.tensors.get(r.name) for n in node.input_types
        ]
        results = kernels[node.op](*operands, **{n: evaluate_attr(v, self.sizes) for n, v in node.attrs.items()})
        for ref, result in zip(node.outputs, [results] if len(node.outputs) == 1 else results, strict=True):
            source = self.plan.source.get(ref.name)
            if ref.name not in self.buffer_of or node.is_view:
                self.tensors[ref.name] = result
            elif source is not None:
                self.tensors[ref.name] = self._tensor(source).copy_(result.clone())
            else:
                self.tensors[ref.name] = self._place(ref.name, result).copy_(result)
                assert result.nbytes <= self.buffer_of[ref.name].size, f"{ref.name} is larger than its buffer"

    def _place(self, name: str, like: torch.Tensor) -> torch.Tensor:
        offset = self.plan.offset(name)
        assert offset is not None, f"{name} must have an offset"
        return self.bytes[offset : offset + like.nbytes].view(like.dtype).view(like.shape)

    def _read(self, name: str) -> None:
        buffer = self.buffer_of.get(name)
        if buffer is None:
            return
        self.users_left[buffer.names] -= 1
        if not self.users_left[buffer.names] and not {ref.name for ref in self.graph.outputs} & set(buffer.names):
            offset = self.plan.offset(name)
            assert offset is not None
            self.bytes[offset : offset + buffer.size] = 0xFF

    def _tensor(self, name: str) -> torch.Tensor:
        value = self.tensors[name]
        assert value is not None, f"{name} is absent"
        return value


def evaluate_attr(value: Any, sizes: Mapping[str, Dim]) -> Any:
    return evaluate(value, sizes) if not isinstance(value, (bool, int, float, str, tuple, type(None))) else value
