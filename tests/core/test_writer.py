"""Tests of the graph writer: names, scopes, declarations, and the time for a large graph."""

import re
import time
from types import SimpleNamespace

import pytest

from sageLLM.runtime.core.errors import IRError, TypeMismatch
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.types import TensorType
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.ir.writer import GraphWriter

(T,) = dims("T")


@pytest.fixture
def g() -> GraphWriter:
    return GraphWriter("g", level="kernel", stage="decode", dtype="f32", device_id=1, stream_id=2)


def test_scopes_name_and_mark_nodes(g: GraphWriter, lib: SimpleNamespace) -> None:
    x, w = g.input("x", "f32", T, 8), g.weight("w", "f32", 8, 8)
    with g.layer(3):
        (n,) = g.emit(lib.Linear, {"x": x, "w": w}, {}, ("n",))
        with g.block_scope("ffn", "L3.ffn"):
            (y,) = g.emit(lib.Linear, {"x": n, "w": w}, {}, ("y",))
    (out,) = g.emit(lib.Linear, {"x": y, "w": w}, {}, ("out",))
    graph = g.finish([out])
    verify(graph)
    facts = [(n.node_id, n.layer_id, n.block, n.origins) for n in graph.nodes.values()]
    assert facts == [("L3.n", 3, None, ()), ("L3.ffn.y", 3, "ffn", ("L3.ffn",)), ("out", None, None, ())]
    assert {(n.device_id, n.stream_id) for n in graph.nodes.values()} == {(1, 2)}
    assert {r.device_id for n in graph.nodes.values() for r in n.outputs} == {1}
    assert (graph.num_layers, graph.level, graph.stage) == (1, "kernel", "decode")
    assert graph.decode_nodes == set(graph.nodes)


def test_names_are_made_unique(g: GraphWriter, lib: SimpleNamespace) -> None:
    x = g.input("y", "f32", T, 8)
    names = [g.emit(lib.Scale, {"x": x}, {}, ("y",))[0].name for _ in range(3)]
    names += [g.emit(lib.Scale, {"x": x}, {}, (name,))[0].name for name in ("y_1", "y")]
    assert names == ["y_1", "y_2", "y_3", "y_1_1", "y_4"]


def test_inputs_and_weights_are_declared_once(g: GraphWriter, lib: SimpleNamespace) -> None:
    x = g.input("x", "f32", T, 8)
    assert g.input("x", "f32", T, 8) is x
    with pytest.raises(IRError, match=re.escape("'x' is already declared as f32[T, 8], got f32[T, 9]")):
        g.input("x", "f32", T, 9)
    with pytest.raises(IRError, match="'x' is already the name of another value"):
        g.weight("x", "f32", T, 8)


def test_an_absent_operand_in_the_middle_is_remembered(g: GraphWriter, lib: SimpleNamespace) -> None:
    x, w, s = g.input("x", "f32", T, 8), g.weight("w", "f32", 3, 8), g.weight("s", "f32", 3)
    g.emit(lib.Linear, {"scale": s, "x": x, "w": w, "bias": None}, {}, ("y",))
    g.emit(lib.Linear, {"x": x, "w": w, "bias": s}, {}, ("z",))
    y, z = (g.graph.nodes[name] for name in "yz")
    assert isinstance(y, lib.Linear)
    assert isinstance(z, lib.Linear)
    assert (y.input("scale"), y.optional_input("bias")) == (s, None)
    assert y.metadata == {"operands": ["x", "w", "scale"]}
    assert (z.input("bias"), z.optional_input("scale"), z.metadata) == (s, None, {})


@pytest.mark.parametrize("repeat", [1, 2])
def test_a_bad_use_is_refused_every_time(g: GraphWriter, lib: SimpleNamespace, repeat: int) -> None:
    x, w = g.input("x", "f32", T, 8), g.weight("w", "f32", 3, 8)
    g.emit(lib.Linear, {"x": x, "w": w}, {"alpha": 1}, ("y",))
    for _ in range(repeat):
        with pytest.raises(TypeMismatch, match="linear: unknown operand 'z', expected x, w, bias, scale"):
            g.emit(lib.Linear, {"x": x, "w": w, "z": x}, {"alpha": 1}, ("y",))
        with pytest.raises(TypeMismatch, match="linear: attribute 'alpha': expected f32, got True"):
            g.emit(lib.Linear, {"x": x, "w": w}, {"alpha": True}, ("y",))
    with pytest.raises(IRError, match="linear: expected 1 output names, got 2: a, b"):
        g.emit(lib.Linear, {"x": x, "w": w}, {}, ("a", "b"))


def test_attributes_of_like_nodes_are_their_own(g: GraphWriter, lib: SimpleNamespace) -> None:
    x, w = g.input("x", "f32", T, 8), g.weight("w", "f32", 8, 8)
    for _ in range(2):
        g.emit(lib.Linear, {"x": x, "w": w}, {}, ("y",))
    g.graph.nodes["y"].attrs["alpha"] = 9.0
    assert g.graph.nodes["y_1"].attrs == {"alpha": 1.0, "mode": None}


def test_block_nodes(g: GraphWriter, lib: SimpleNamespace) -> None:
    x = g.input("x", "f32", T, 8)
    type_ = TensorType("f32", (T, 8))
    with g.layer(0):
        (y,) = g.call_block("ffn", lib.OpType.FFN, [x], ("ffn",), (type_,), {"n": T}, metadata={"call": "L0.ffn"})
        g.call_block(None, lib.OpType.KV_STORE, [y], (), (), node_id="store", dependencies=["L0.ffn"])
    ffn, store = g.graph.nodes.values()
    assert (ffn.node_id, ffn.block, ffn.attrs, ffn.metadata) == ("L0.ffn", "ffn", {"n": T}, {"call": "L0.ffn"})
    assert (store.node_id, store.block, store.dependencies, store.layer_id) == ("L0.store", None, {"L0.ffn"}, 0)
    with pytest.raises(IRError, match="KV_STORE: a node without outputs must have a node_id"):
        g.call_block(None, lib.OpType.KV_STORE, [y], (), ())


def test_a_graph_returns_its_own_values(g: GraphWriter) -> None:
    with pytest.raises(IRError, match="graph 'g' returns the unknown value 'q'"):
        g.finish([TensorRef("q", (1,), "f32")])


def build_80_layers(lib: SimpleNamespace) -> ExecutionGraph:
    g = GraphWriter("g", level="kernel", stage="decode", dtype="f32")
    x = g.input("x", "f32", T, 64)
    for i in range(80):
        with g.layer(i), g.block_scope("ffn", f"L{i}.ffn"):
            for k in range(15):
                (x,) = g.emit(lib.Linear, {"x": x, "w": g.weight(f"layers.{i}.w{k}", "f32", 64, 64)}, {}, ("y",))
    return g.finish([x])


def test_an_80_layer_graph_is_built_fast(lib: SimpleNamespace) -> None:
    """About 20 ms on one core of a server; the bound allows for a slower one and catches a lost memo."""
    times = []
    for _ in range(5):
        start = time.process_time()  # what others do on the machine does not count
        assert len(build_80_layers(lib).nodes) == 1200
        times.append(time.process_time() - start)
    assert min(times) < 0.25
