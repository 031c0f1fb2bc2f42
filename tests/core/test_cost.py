"""Tests of the cost model against figures computed by hand."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from sageLLM.runtime.core.cost import Cost, Efficiency, Hardware, Link, annotate, estimate
from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.writer import GraphWriter

T, KV = dims("T KV")
MACHINE = Hardware(
    name="toy",
    peak_flops={"f32": 1e9, "bf16": 4e9},
    memory_bandwidth=1e8,
    memory_bytes=10**9,
    launch_overhead_us=2.0,
    link=Link(bandwidth=1e6, latency_us=10.0),
    host_link=Link(bandwidth=1e7, latency_us=5.0),
    efficiency={"gemm": Efficiency(0.5, 0.5)},
)


def ref(name: str, *shape: Any, dtype: str = "f32") -> TensorRef:
    return TensorRef(name, shape, dtype)


def linear(lib: SimpleNamespace, rows: Any, dtype: str = "f32") -> ExecutionNode:
    inputs = [ref("x", rows, 100, dtype=dtype), ref("w", 10, 100, dtype=dtype)]
    node: ExecutionNode = lib.Linear("n", lib.OpType.LINEAR, inputs, [ref("y", rows, 10, dtype=dtype)])
    return node


def comm(lib: SimpleNamespace, kind: str, **fields: Any) -> ExecutionNode:
    return ExecutionNode("n", lib.OpType[kind], [ref("x", 1000)], [ref("y", 1000)], **fields)


def test_a_kernel_is_bound_by_memory_or_by_arithmetic(lib: SimpleNamespace) -> None:
    # 2*1*10*100 flops = 2 us; (110 + 1000) * 4 bytes = 44.4 us; half the speed; 2 us to launch
    assert estimate(linear(lib, 1), MACHINE) == Cost(2000, 4440, pytest.approx(44.4 / 0.5 + 2))
    # 1e6 rows: 2e9 flops = 2e6 us; 4.40004e8 + 4000 bytes = 4.40004e6 us
    assert estimate(linear(lib, 10**6), MACHINE).time_us == pytest.approx(4.40004e6 / 0.5 + 2)
    fast_memory = Hardware("x", {"f32": 1e9}, 1e12, 1, 0.0, MACHINE.link, MACHINE.host_link)
    assert estimate(linear(lib, 10**6), fast_memory).time_us == pytest.approx(2e6)


def test_an_efficiency_combines_both_times_and_replaces_the_launch(lib: SimpleNamespace) -> None:
    """1000 rows: 2 ms of arithmetic and 4.44 ms of memory traffic at full efficiency."""
    efficiency = Efficiency(compute=0.5, memory=2.0, overlap=2.0, launch_us=7.0)
    machine = dataclasses.replace(MACHINE, efficiency={"linear": efficiency, "default": Efficiency(launch_us=9.0)})
    expected = (4000.0**2 + 2220.0**2) ** 0.5
    assert estimate(linear(lib, 1000), machine).time_us == pytest.approx(expected + 7)
    added = dataclasses.replace(MACHINE, efficiency={"linear": dataclasses.replace(efficiency, overlap=1.0)})
    assert estimate(linear(lib, 1000), added).time_us == pytest.approx(4000 + 2220 + 7)
    other = ExecutionNode("n", lib.OpType.ROPE, [ref("x", 1000)], [ref("y", 1000)])
    assert estimate(other, machine).time_us == pytest.approx(80 + 9)


def test_symbols_are_bound_or_named_in_the_error(lib: SimpleNamespace) -> None:
    assert estimate(linear(lib, T), MACHINE, {"T": 1}) == estimate(linear(lib, 1), MACHINE)
    with pytest.raises(IRError, match="n: the estimate requires T"):
        estimate(linear(lib, T), MACHINE)
    node = lib.Attention("n", lib.OpType.DECODE_ATTN, [ref("q", 1, 4, 16), ref("k", 9, 2, 16)], [ref("o", 1, 64)])
    assert estimate(node, MACHINE, {"KV": 5}).flops == 1280
    with pytest.raises(IRError, match="n: the estimate requires KV"):
        estimate(node, MACHINE)


def test_a_plain_node_moves_its_tensors_or_declares_its_work(lib: SimpleNamespace) -> None:
    node = ExecutionNode("n", lib.OpType.FFN, [ref("x", T, 10)], [ref("y", T, 10)])
    assert estimate(node, MACHINE, {"T": 2}) == Cost(0, 160, pytest.approx(1.6 + 2))
    node.attrs = {"flops": 10**6 * T, "bytes": 0}
    assert estimate(node, MACHINE, {"T": 2}) == Cost(2 * 10**6, 0, pytest.approx(2000 + 2))
    node.attrs = {"flops": "many"}
    with pytest.raises(IRError, match="n: attribute 'flops': expected a size, got 'many'"):
        estimate(node, MACHINE)


def test_peak_goes_by_element_type(lib: SimpleNamespace) -> None:
    machine = Hardware("x", MACHINE.peak_flops, 1e15, 1, 0.0, MACHINE.link, MACHINE.host_link)
    f32, bf16, f64 = (estimate(linear(lib, 10, dtype), machine).time_us for dtype in ("f32", "bf16", "f64"))
    assert bf16 == pytest.approx(f32 / 4)
    assert f64 == f32


@pytest.mark.parametrize(
    ("kind", "fields", "env", "time_us"),
    [
        # 4000 bytes over 1e6 bytes/s are 4000 us; latency 10 us a step; launch 2 us
        ("COMM_ALLREDUCE", {}, {}, 2 * 1 / 2 * 4000 + 2 * 10 + 2),
        ("COMM_ALLREDUCE", {}, {"tp": 4}, 2 * 3 / 4 * 4000 + 6 * 10 + 2),
        ("COMM_ALLREDUCE", {"attrs": {"group": "ep"}}, {"tp": 4, "ep": 8}, 2 * 7 / 8 * 4000 + 14 * 10 + 2),
        ("COMM_ALLREDUCE", {"metadata": {"ranks": 4}}, {}, 2 * 3 / 4 * 4000 + 6 * 10 + 2),
        ("COMM_ALLREDUCE", {}, {"tp": 1}, 2),
        ("COMM_ALLGATHER", {"attrs": {"W": 4}}, {}, 3 / 4 * 4000 + 3 * 10 + 2),
        ("COMM_SEND", {}, {}, 4000 + 10 + 2),
        ("KV_MIGRATE", {}, {}, 4000 + 10 + 2),
        ("KV_LOAD", {"metadata": {"tier": "host"}}, {}, 400 + 5 + 2),
        ("KV_LOAD", {}, {}, 80 + 2),
        ("KV_STORE", {"metadata": {"tier": "device"}}, {}, 80 + 2),
    ],
)
def test_transfers(lib: SimpleNamespace, kind: str, fields: Any, env: Any, time_us: float) -> None:
    assert estimate(comm(lib, kind, **fields), MACHINE, env).time_us == pytest.approx(time_us)


def test_a_view_costs_nothing(lib: SimpleNamespace) -> None:
    node = lib.Halves("n", lib.OpType.VIEW, [ref("x", T, 8)], [ref("a", T, 4), ref("b", T, 4)])
    assert estimate(node, MACHINE) == Cost(0, 0, 0.0)


def test_annotate_fills_in_times_and_bytes(lib: SimpleNamespace) -> None:
    g = GraphWriter("g", level="kernel", stage="decode", dtype="f32")
    x = g.input("x", "f32", T, 10)
    for i in range(3):
        (x,) = g.emit(lib.Linear, {"x": x, "w": g.weight(f"w{i}", "f32", 10, 10)}, {}, ("y",))
    graph = g.finish([x])
    annotate(graph, MACHINE, {"T": 4})
    expected = estimate(graph.nodes["y"], MACHINE, {"T": 4}).time_us
    assert [n.estimated_time_us for n in graph.nodes.values()] == [expected] * 3
    assert [n.memory_bytes for n in graph.nodes.values()] == [160] * 3
    assert graph.estimate_total_time() == pytest.approx(3 * expected)


def test_an_unknown_element_type_is_an_error(lib: SimpleNamespace) -> None:
    node = ExecutionNode("n", lib.OpType.FFN, [], [ref("y", 1, dtype="f8")])
    with pytest.raises(IRError, match=r"y: f8\[1\]: unknown element type, expected one of bool, i8"):
        estimate(node, MACHINE)
