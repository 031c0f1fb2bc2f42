"""Tests of the verifier: every rule is broken once, and all problems are reported together."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sageLLM.runtime.core.errors import VerifyError
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.ir.writer import GraphWriter

(T,) = dims("T")


def ref(name: str, *shape: Any) -> TensorRef:
    return TensorRef(name, shape or (T, 8), "f32")


@pytest.fixture
def graph(lib: SimpleNamespace) -> ExecutionGraph:
    """x -> a -> b, with a weight."""
    g = GraphWriter("g", level="kernel", stage="decode", dtype="f32")
    x, w = g.input("x", "f32", T, 8), g.weight("w", "f32", 8, 8)
    (a,) = g.emit(lib.Linear, {"x": x, "w": w}, {}, ("a",))
    (b,) = g.emit(lib.Linear, {"x": a, "w": w}, {}, ("b",))
    graph = g.finish([b])
    verify(graph)
    return graph


def problems(graph: ExecutionGraph) -> list[str]:
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    return list(caught.value.problems)


def add(graph: ExecutionGraph, lib: SimpleNamespace, node_id: str, reads: list[TensorRef], *writes: TensorRef) -> None:
    graph.add_node(ExecutionNode(node_id, lib.OpType.FFN, reads, list(writes)))


BREAKS: list[tuple[Callable[[ExecutionGraph, SimpleNamespace], object], str]] = [
    (lambda g, lib: g.nodes["a"].dependencies.add("ghost"), "a: unknown dependency 'ghost'"),
    (lambda g, lib: g.add_edge("b", "a"), "dependency cycle: a -> b -> a"),
    (lambda g, lib: add(g, lib, "c", [], ref("b")), "c: writes 'b', which is already an output of b"),
    (lambda g, lib: add(g, lib, "c", [], ref("x")), "c: writes 'x', which is already an input of the graph"),
    (lambda g, lib: g.weights.update(x=ref("x")), "'x' is both an input and a weight"),
    (lambda g, lib: g.inputs.update(y=ref("z")), "'y' is declared as 'z'"),
    (lambda g, lib: add(g, lib, "c", [ref("x", 3)]), "c: 'x' is f32[3], but f32[T, 8] in the inputs"),
    (lambda g, lib: add(g, lib, "c", [ref("q")]), "c: reads the unknown value 'q'"),
    (lambda g, lib: g.outputs.append(ref("q")), "the graph returns the unknown value 'q'"),
    (lambda g, lib: g.nodes["b"].dependencies.clear(), "b: reads 'a' without waiting for a"),
    (lambda g, lib: g.nodes["b"].attrs.update(alpha=-1), "b: linear: attribute 'alpha': expected at least 0.0, got -1"),
    (lambda g, lib: g.decode_nodes.add("ghost"), "decode_nodes names the unknown node 'ghost'"),
    (
        lambda g, lib: g.nodes["b"].metadata.update(k=(1, 2)),
        "b: metadata must be plain JSON data, got a tuple",
    ),
    (
        lambda g, lib: g.nodes["b"].metadata.update(k=[{1: 2}]),
        "b: metadata must be plain JSON data, got the key 1",
    ),
    (
        lambda g, lib: g.nodes.update(c=ExecutionNode("d", lib.OpType.FFN, [], [])),
        "c: the node's own id is 'd'",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS, ids=[message for _, message in BREAKS])
def test_a_broken_rule_is_reported(graph: ExecutionGraph, lib: SimpleNamespace, damage: Any, message: str) -> None:
    damage(graph, lib)
    assert problems(graph) == [message]


def test_all_problems_are_reported_together(graph: ExecutionGraph, lib: SimpleNamespace) -> None:
    add(graph, lib, "c", [ref("q")], ref("b"))
    graph.nodes["a"].dependencies.add("ghost")
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert str(caught.value) == (
        "a: unknown dependency 'ghost'\nc: writes 'b', which is already an output of b\nc: reads the unknown value 'q'"
    )


def inplace_graph(lib: SimpleNamespace, *, of: str) -> tuple[GraphWriter, TensorRef]:
    """A graph with a node `s` that overwrites an input, a weight, or a view of a value."""
    g = GraphWriter("g", level="kernel", stage="decode", dtype="f32")
    x = g.weight("x", "f32", T, 8) if of == "weight" else g.input("x", "f32", T, 8)
    source = g.emit(lib.Halves, {"x": x}, {}, ("l", "r"))[0] if of == "view" else x
    return g, source


def test_a_user_after_an_overwriting_node_is_a_hazard(lib: SimpleNamespace) -> None:
    g, x = inplace_graph(lib, of="input")
    (s,) = g.emit(lib.Scale, {"x": x}, {}, ("s",))
    g.emit(lib.SiluMul, {"gu": x}, {}, ("late",))
    graph = g.finish([s])
    assert problems(graph) == ["s: scale overwrites 'x', and late may read it later"]
    graph.add_edge("late", "s")
    verify(graph)


def test_a_user_ordered_before_is_safe(lib: SimpleNamespace) -> None:
    g, x = inplace_graph(lib, of="input")
    g.emit(lib.SiluMul, {"gu": x}, {}, ("early",))
    (s,) = g.emit(lib.Scale, {"x": x}, {}, ("s",))
    graph = g.finish([s])
    assert problems(graph) == ["s: scale overwrites 'x', and early may read it later"]
    graph.add_edge("early", "s")
    verify(graph)


def test_views_share_memory_with_their_source_and_not_with_each_other(lib: SimpleNamespace) -> None:
    g, left = inplace_graph(lib, of="view")
    (s,) = g.emit(lib.Scale, {"x": left}, {}, ("s",))
    g.emit(lib.SiluMul, {"gu": g.graph.nodes["l"].outputs[1]}, {}, ("other_half",))
    graph = g.finish([s])
    verify(graph)
    g.emit(lib.SiluMul, {"gu": graph.inputs["x"]}, {}, ("whole",))
    assert problems(graph) == ["s: scale overwrites 'x', and whole may read it later"]


def test_a_view_of_an_overwritten_value_counts_through_its_readers(lib: SimpleNamespace) -> None:
    g, x = inplace_graph(lib, of="input")
    left, _ = g.emit(lib.Halves, {"x": x}, {}, ("l", "r"))
    (s,) = g.emit(lib.Scale, {"x": x}, {}, ("s",))
    g.emit(lib.SiluMul, {"gu": left}, {}, ("late",))
    assert problems(g.finish([s])) == ["s: scale overwrites 'l', and late may read it later"]


def test_weights_and_results_are_not_overwritten(lib: SimpleNamespace) -> None:
    g, x = inplace_graph(lib, of="weight")
    (s,) = g.emit(lib.Scale, {"x": x}, {}, ("s",))
    (u,) = g.emit(lib.Scale, {"x": s}, {}, ("u",))
    assert problems(g.finish([s, u])) == [
        "s: scale overwrites the weight 'x'",
        "u: scale overwrites 's', which the graph returns",
    ]
