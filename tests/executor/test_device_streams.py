"""Streams of a GPU in plans, with objects that record what a GPU would be told: no GPU is required."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from sageLLM.generated import ops
from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.executor.cuda_graphs import DeviceBuffers, GraphedPlan
from sageLLM.runtime.executor.device_api import CudaApi
from sageLLM.runtime.executor.torch_plan import Plan

from ..passes.op_graphs import TWO_RANKS, op_graphs, random_values, run, same_bits

B, T, MB = dims("B T MB")


class Stream:
    """A stream: the number of its operations, and how many operations of each stream are done before its next one."""

    def __init__(self, api: StreamApi) -> None:
        self.api, self.count = api, 0
        self.done: dict[Stream, int] = {}

    def operation(self) -> dict[Stream, int]:
        """Adds an operation; returns what is done before it."""
        before = dict(self.done)
        self.count += 1
        self.done[self] = self.count
        return before

    def wait_event(self, event: Event) -> None:
        assert event.recorded is not None, "an event is recorded before a stream waits for it"
        for stream, count in event.recorded.items():
            self.done[stream] = max(count, self.done.get(stream, 0))

    def wait_stream(self, other: Stream) -> None:
        for stream, count in other.done.items():
            self.done[stream] = max(count, self.done.get(stream, 0))


class Event:
    recorded: dict[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self.recorded = dict(stream.done)


class StreamApi:
    """The streams of a device that records, as `CudaApi` those of a GPU."""

    def __init__(self) -> None:
        self.main = self.now = Stream(self)

    def new_stream(self) -> Stream:
        return Stream(self)

    def new_event(self) -> Event:
        return Event()

    def current_stream(self) -> Stream:
        return self.now

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


def recording(api: StreamApi, log: list[tuple[Stream, int, dict[Stream, int]]]) -> Mapping[str, Any]:
    """The kernels, each of which adds an operation to the current stream."""

    def wrap(kernel: Any) -> Any:
        def call(*operands: Any, **attrs: Any) -> Any:
            stream = api.current_stream()
            before = stream.operation()
            log.append((stream, stream.count, before))
            return kernel(*operands, **attrs)

        return call

    return {op: wrap(kernel) for op, kernel in TWO_RANKS.items()}


@given(op_graphs(num_streams=3))
@settings(max_examples=40, deadline=None)
def test_every_dependency_is_kept_by_a_stream_or_an_event(graph: ExecutionGraph) -> None:
    api, log = StreamApi(), []
    values = random_values(graph)
    expected = run(graph.copy(), values)
    plan = Plan(graph, recording(api, log), {"w": values["w"]}, api)
    for _ in range(2):
        log.clear()
        assert same_bits(plan.run({name: values[name] for name in graph.inputs}), expected)
        order = graph.topological_sort()
        operations = {node.node_id: one for node, one in zip(order, log, strict=True)}
        for node in order:
            _, _, before = operations[node.node_id]
            for name in node.dependencies:
                stream, count, _ = operations[name]
                assert before.get(stream, 0) >= count, f"{node.node_id} may start before {name} is done"
        if order:
            used = {node.stream_id for node in order}
            assert len({stream for stream, _, _ in log}) == len(used)
        assert all(api.main.done.get(stream, 0) >= count for stream, count, _ in log), "the step joins its streams"


def test_a_value_that_two_streams_use_lives_to_the_end() -> None:
    """torch would give its memory to the next result of the stream that made it, while the other stream may read it."""
    g = GraphWriter("lives", level="kernel", stage=None, dtype="f64")
    x = g.input("x", "f64", T, 8)
    crossing, own = ops.add(g, x, x), ops.mul(g, x, x)
    read = ops.scale(g, crossing, factor=2.0)
    graph = g.finish([ops.add(g, ops.add(g, ops.scale(g, own, factor=3.0), x), read)])
    graph.nodes[read.name].stream_id = 1
    alive: list[tuple[bool, bool]] = []
    made: dict[str, weakref.ref[torch.Tensor]] = {}

    def watch(op: str) -> Any:
        def call(*operands: Any, **attrs: Any) -> torch.Tensor:
            alive.append(tuple(name in made and made[name]() is not None for name in ("add", "mul")))
            result = KERNELS[op](*operands, **attrs)
            made.setdefault(op, weakref.ref(result))
            return result

        return call

    plan = Plan(graph, {op: watch(op) for op in ("add", "mul", "scale")}, {}, StreamApi())
    plan.run({"x": torch.rand(3, 8, dtype=torch.float64)})
    assert alive[-1] == (True, False), "the value of one stream is freed after its last use"


class CapturingApi(StreamApi):
    """The device with memory and graphs: a graph runs its work again when it is replayed."""

    def __init__(self, log: list[tuple[Stream, int, dict[Stream, int]]]) -> None:
        super().__init__()
        self.log = log
        self.captured: list[int] = []

    def ints(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32)

    host_ints = device_ints = ints

    def new_event(self) -> Any:
        return DoneEvent()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def synchronize(self) -> None:
        pass

    def capture(self, work: Any) -> tuple[Any, list[torch.Tensor]]:
        """As torch's: another stream is current; the work of all streams must have joined it at the end."""
        stream, start = Stream(self), len(self.log)
        with self.use(stream):
            outputs = work()
        assert all(stream.done.get(one, 0) >= count for one, count, _ in self.log[start:])
        self.captured.append(len(self.log) - start)
        return Replayed(lambda: [x.copy_(y) for x, y in zip(outputs, work(), strict=True)]), outputs


class DoneEvent(Event):
    """An event of streams, or of copies, which are done at once."""

    def record(self, stream: Stream | None = None) -> None:
        if stream is not None:
            super().record(stream)

    def query(self) -> bool:
        return True


@dataclass
class Replayed:
    replay: Any


def test_a_bucket_is_captured_once_with_its_streams() -> None:
    g = GraphWriter("decode", level="kernel", stage="decode", dtype="f32")
    ids, table, w = g.input("ids", "i32", B), g.input("block_table", "i32", B, MB), g.weight("w", "f32", 9, 8)
    a = ops.embedding(g, ids, w)
    b, c = ops.scale(g, a, factor=2.0), ops.mul(g, a, a)
    graph = g.finish([ops.add(g, b, c)])
    graph.inputs |= {"block_table": table}
    graph.nodes[b.name].stream_id = 1
    log: list[tuple[Stream, int, dict[Stream, int]]] = []
    api, values = CapturingApi(log), torch.rand(9, 8)
    plan = GraphedPlan(graph, recording(api, log), {"w": values}, DeviceBuffers(api))
    steps = [(4, 2), (4, 1), (2, 1)]
    for is_captured in (False, True):
        for num_rows, width in steps:
            chosen = torch.randint(0, 9, (num_rows,), dtype=torch.int32)
            step = {"ids": chosen, "block_table": torch.zeros(num_rows, width, dtype=torch.int32)}
            if not is_captured:
                plan.capture(step)
            log.clear()
            (found,) = plan.run(step)
            torch.testing.assert_close(found, 2 * values[chosen] + values[chosen] ** 2)
    assert api.captured == [4, 4, 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
@given(op_graphs(num_streams=3))
@settings(max_examples=40, deadline=None)
def test_streams_of_a_gpu_give_the_bits_of_one(graph: ExecutionGraph) -> None:
    values = {name: x.cuda() for name, x in random_values(graph).items()}
    inputs = {name: values[name] for name in graph.inputs}
    expected = Plan(graph, TWO_RANKS, {"w": values["w"]}).run(inputs)
    plan = Plan(graph, TWO_RANKS, {"w": values["w"]}, CudaApi())
    for _ in range(3):
        assert same_bits(plan.run(inputs), expected)
