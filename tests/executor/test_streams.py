"""Streams of native plans: the executed order keeps every wait, streams overlap, results are those of one stream."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.generated import ops
from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.passes.events import WAITS, plan_events
from sageLLM.runtime.executor.native.call_times import CallTime
from sageLLM.runtime.executor.native.calls import CallList
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import KernelError, kernel_function
from sageLLM.runtime.kernels.cpu.native import NativeRunner

from ..passes.op_graphs import TWO_RANKS, op_graphs, random_values, same_bits

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
LIMIT = 60.0  # seconds after which a call that was never released counts as lost
(T,) = dims("T")
Signature = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


class Calls:
    """A call list of Python functions, which return None or the message of an error."""

    def __init__(self, runner: NativeRunner) -> None:
        self.list, self.num_streams = CallList(), 1
        self._runner, self._kept = runner, []

    def add(self, function: Callable[[], bytes | None], stream: int = 0, waits: tuple[int, ...] = ()) -> int:
        def call(tensors: int, sizes: int, attrs: int) -> int | None:
            message = function()
            if message is None:
                return None
            text = ctypes.create_string_buffer(message)
            self._kept.append(text)
            return ctypes.addressof(text)

        self._kept.append(made := Signature(call))
        self.list.add(ctypes.cast(made, ctypes.c_void_p).value or 0, [], [], [], stream, waits)
        self.num_streams = max(self.num_streams, stream + 1)
        return len(self.list) - 1

    def run(self) -> None:
        self.list.finish()
        self._runner.run(self.list.address, 0, len(self.list), self.num_streams)


# the runner


def test_a_stream_runs_while_another_computes(runner: NativeRunner) -> None:
    """The first call of stream 1 returns only when a call of stream 0 that does not wait for it has begun."""
    calls, begun = Calls(runner), threading.Event()
    seen: list[bool] = []
    calls.add(lambda: seen.append(begun.wait(LIMIT)), stream=1)
    calls.add(begun.set)
    calls.run()
    assert seen == [True]


def test_a_call_waits_for_the_calls_that_it_names(runner: NativeRunner) -> None:
    """Also for longer than a thread polls, in both directions."""
    for seconds in (0.0, 0.002):
        calls, done = Calls(runner), []

        def call(name: str, seconds: float = seconds, done: list[str] = done) -> Callable[[], None]:
            return lambda: (time.sleep(seconds), done.append(name))[0]

        a = calls.add(call("a"))
        b = calls.add(call("b"), 1, (a,))
        c = calls.add(call("c"), 2, (b,))
        calls.add(call("d"), 0, (c,))
        calls.run()
        assert done == ["a", "b", "c", "d"]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_a_stream_ends_the_run(runner: NativeRunner, failing: int) -> None:
    """The other stream waits for the failed call, in its sleep, and makes none of its later calls."""
    for _ in range(3):
        calls, made = Calls(runner), []
        fail = calls.add(lambda: time.sleep(0.002) or b"the kernel: a broken rule", failing)
        calls.add(lambda made=made: made.append("later"), 1 - failing, (fail,))
        calls.add(lambda made=made: made.append("after"), failing)
        with pytest.raises(KernelError, match="the kernel: a broken rule"):
            calls.run()
        assert made == []
    calls = Calls(runner)
    calls.add(lambda: made.append("next"), 1)
    calls.run()
    assert made == ["next"], "the streams are ready for the next run"


def test_concurrent_runs_are_all_complete(runner: NativeRunner) -> None:
    """One of them has the threads of the streams; the others run their lists in order."""

    def run(made: list[int]) -> None:
        for number in range(40):
            calls = Calls(runner)
            first = calls.add(lambda number=number: made.append(2 * number), 1)
            calls.add(lambda number=number: made.append(2 * number + 1), 0, (first,))
            calls.run()

    lists: list[list[int]] = [[], [], []]
    threads = [threading.Thread(target=run, args=(made,)) for made in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lists == [list(range(80))] * 3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="requires /proc")
def test_an_idle_stream_sleeps(runner: NativeRunner) -> None:
    calls = Calls(runner)
    threads: list[int] = []
    calls.add(lambda: threads.append(threading.get_native_id()), 1)
    calls.run()
    status = Path(f"/proc/self/task/{threads[0]}/stat")
    deadline = time.monotonic() + LIMIT
    while (state := status.read_text().rpartition(")")[2].split()[0]) != "S" and time.monotonic() < deadline:
        time.sleep(0.001)
    assert state == "S"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not support fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_its_own_streams(runner: NativeRunner) -> None:
    calls = Calls(runner)
    threads: set[int] = set()
    calls.add(lambda: threads.add(threading.get_native_id()), 1)
    calls.run()
    child = os.fork()
    if child == 0:
        threads.clear()
        calls.run()
        os._exit(0 if len(threads) == 1 and threading.get_native_id() not in threads else 1)
    deadline = time.monotonic() + LIMIT
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended[0] == child and os.waitstatus_to_exitcode(ended[1]) == 0


# plans


class SlowRunner(NativeRunner):
    """The functions of a runner with random delays, and some ops without a function."""

    def __init__(self, runner: NativeRunner, random: Random, missing: frozenset[str] = frozenset()) -> None:
        self.__dict__.update(runner.__dict__)
        self._random, self._missing, self._made = random, missing, []

    def why_not(self, op: str, element: str | None, attrs: Mapping[str, Any]) -> str | None:
        return "missing" if op in self._missing else None  # collectives of a single rank copy

    def address(self, op: str, element: str | None, *, unpacks: bool = False, form: str | None = None) -> int:
        function, delay = (
            kernel_function(super().address(op, element, unpacks=unpacks, form=form)),
            self._random.choice(DELAYS),
        )
        if not delay:
            return super().address(op, element, unpacks=unpacks, form=form)

        def call(tensors: int, sizes: int, attrs: int) -> None:
            time.sleep(delay)
            function(tensors, sizes, attrs)

        self._made.append(made := Signature(call))
        return ctypes.cast(made, ctypes.c_void_p).value or 0


DELAYS = (0.0, 0.0, 1e-5, 3e-4)


def in_one_stream(graph: ExecutionGraph) -> ExecutionGraph:
    other = graph.copy()
    for node in other.nodes.values():
        node.stream_id = 0
        node.metadata.pop(WAITS, None)
    return other


def ancestors(graph: ExecutionGraph) -> Iterator[tuple[str, str]]:
    """Pairs of a node and another that must be done before it."""
    before: dict[str, set[str]] = {}
    for node in graph.topological_sort():
        before[node.node_id] = node.dependencies.union(*(before[name] for name in node.dependencies))
        yield from ((node.node_id, name) for name in before[node.node_id])


def assert_keeps_dependencies(graph: ExecutionGraph, times: list[CallTime]) -> None:
    begin: dict[str, int] = {}
    end: dict[str, int] = {}
    for one in times:
        begin.setdefault(one.node_id, one.begin_order)
        end[one.node_id] = one.end_order
    orders = sorted(order for one in times for order in (one.begin_order, one.end_order))
    assert len(set(orders)) == len(orders), "each beginning and each end has its own number"
    for later, earlier in ancestors(graph):
        if later in begin and earlier in end:
            assert end[earlier] < begin[later], f"{later} began before {earlier} was done"


@given(op_graphs(num_streams=3, dtype="f32"), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=60)
def test_streams_give_the_bits_of_one_stream(
    runner: NativeRunner, graph: ExecutionGraph, random: Random, has_python_calls: bool
) -> None:
    values = random_values(graph)
    weights = {"w": values["w"]}
    missing = frozenset({"scale", "fused_add_rms_norm"} if has_python_calls else ())
    expected = NativePlan(in_one_stream(graph), SlowRunner(runner, Random(0), missing), TWO_RANKS, weights)
    (x,) = (values[name] for name in graph.inputs)
    results = [y.clone() for y in expected.run({"x": x})]
    plan = NativePlan(graph, SlowRunner(runner, random, missing), TWO_RANKS, weights, poison=True)
    for _ in range(2):
        assert same_bits(plan.run({"x": x}), results)
        times = plan.time_calls({"x": x})
        assert_keeps_dependencies(graph, times)
        streams = {node.stream_id for node in graph.nodes.values()}
        assert {one.stream for one in times} <= set(range(len(streams)))


def test_a_view_passes_its_waits_on(runner: NativeRunner) -> None:
    """`half` has no call: the nodes after it, of its own stream and of another, wait for what it waits for."""
    g = GraphWriter("views", level="kernel", stage=None, dtype="f32")
    x = g.input("x", "f32", T, 16)
    a = ops.add(g, x, x)
    left, right = ops.split_halves(g, a)
    b, c = ops.add(g, left, right), ops.mul(g, left, right)
    graph = g.finish([ops.add(g, b, c)])
    stream_of = {"split_halves": 1, "mul": 1, "add": 0}
    for node in graph.nodes.values():
        node.stream_id = stream_of[node.op]
    graph.nodes[b.name].stream_id = 2
    plan_events(graph)
    for seed in range(10):
        plan = NativePlan(graph, SlowRunner(runner, Random(seed)), KERNELS, {}, poison=True)
        times = plan.time_calls({"x": torch.rand(3, 16)})
        assert [one.op for one in times if one.op != "poison"] == ["add", "add", "mul", "add"]
        assert_keeps_dependencies(graph, times)


def test_memory_of_a_concurrent_reader_is_not_reused(runner: NativeRunner) -> None:
    """`h` may not be written in place of `residual`, which a node of another stream may still read."""
    g = GraphWriter("readers", level="kernel", stage=None, dtype="f32")
    x, w = g.input("x", "f32", T, 24), g.weight("w", "f32", 24)
    residual = ops.add(g, x, x)
    read = ops.mul(g, residual, x)
    normed, h = ops.fused_add_rms_norm(g, x, residual, w, eps=1e-6)
    graph = g.finish([normed, h, ops.add(g, read, x)])
    graph.nodes[read.name].stream_id = 1
    weights, rows = {"w": torch.randn(24)}, torch.randn(5, 24)
    results = [y.clone() for y in NativePlan(in_one_stream(graph), runner, KERNELS, weights).run({"x": rows})]
    for seed in range(5):
        plan = NativePlan(graph, SlowRunner(runner, Random(seed)), KERNELS, weights, poison=True)
        assert same_bits(plan.run({"x": rows}), results)


def test_a_plan_of_several_devices_is_an_error(runner: NativeRunner) -> None:
    g = GraphWriter("devices", level="kernel", stage=None, dtype="f32")
    x = g.input("x", "f32", T, 8)
    graph = g.finish([ops.add(g, ops.add(g, x, x), x)])
    next(iter(graph.nodes.values())).device_id = 1
    with pytest.raises(ValueError, match="a plan runs on one device, got 2"):
        NativePlan(graph, runner, KERNELS, {})
