"""Tests of the text and JSON forms: exact round trips, and errors with a position."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.runtime.core.errors import IRError, ParseError
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.text import parse_text, to_text
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.inspect.export import from_json, to_json

SCALE = int(os.environ.get("SAGELLM_TEXT_SCALE", "1"))  # `make fuzz-text` multiplies the numbers of random inputs
T, H = dims("T H")
NAMES = st.one_of(
    st.sampled_from(["x", "y", "L0.n", "L1.attention.qkv", "layers.0.w", "input", "graph", "members", "a b", "é", ""]),
    st.text(max_size=6),
)
SIZES = st.one_of(st.integers(0, 512), st.sampled_from([T, 2 * H + 1, (T + 3) // 4, H % 2 - T]))
REFS = st.builds(
    TensorRef,
    NAMES,
    st.lists(SIZES, max_size=3).map(tuple),
    st.sampled_from(["f32", "bf16", "i32", "float 16"]),
    st.sampled_from([0, 0, 0, 1, 7]),
)
FLOATS = st.floats(allow_nan=False)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, st.text(max_size=5))
ATTR = st.recursive(
    st.one_of(SCALARS, st.sampled_from([T, T * H + 1])), lambda inner: st.lists(inner, max_size=3).map(tuple)
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
)


@st.composite
def graphs(draw: st.DrawFn, lib: SimpleNamespace) -> ExecutionGraph:
    """Any graph that the types allow: names shared and odd, dependencies and memberships as they come."""
    graph = ExecutionGraph(
        draw(NAMES),
        level=draw(st.sampled_from(["block", "kernel"])),
        stage=draw(st.sampled_from([None, "prefill", "decode", "hybrid"])),
        num_layers=draw(st.integers(0, 3)),
        inputs={ref.name: ref for ref in draw(st.lists(REFS, max_size=2))},
        weights={ref.name: ref for ref in draw(st.lists(REFS, max_size=2))},
        outputs=draw(st.lists(REFS, max_size=2)),
    )
    for node_id in draw(st.lists(NAMES, max_size=4, unique=True)):
        graph.add_node(draw(nodes(lib, node_id)))
    if draw(st.booleans()):
        graph.prefill_nodes = draw(st.sets(NAMES, max_size=2))
        graph.comm_nodes = draw(st.sets(NAMES, max_size=2))
    for node in graph.nodes.values():
        if draw(st.integers(0, 4)) == 0:
            node.dependencies = draw(st.sets(NAMES, max_size=2))
    return graph


@st.composite
def nodes(draw: st.DrawFn, lib: SimpleNamespace, node_id: str) -> ExecutionNode:
    cls = draw(st.sampled_from([ExecutionNode, ExecutionNode, *lib.ops.values()]))
    refs = st.lists(REFS, max_size=2)
    return cls(
        node_id,
        draw(st.sampled_from(list(lib.OpType))),
        draw(refs),
        draw(refs),
        dependencies=draw(st.sets(NAMES, max_size=2)),
        device_id=draw(st.integers(0, 2)),
        stream_id=draw(st.integers(0, 2)),
        estimated_time_us=draw(FLOATS),
        memory_bytes=draw(st.integers(0, 10**12)),
        layer_id=draw(st.one_of(st.none(), st.integers(0, 99))),
        metadata=draw(st.dictionaries(st.text(max_size=3), PLAIN, max_size=2)),
        attrs=draw(st.dictionaries(NAMES, ATTR, max_size=2)),
        block=draw(st.one_of(st.none(), NAMES)),
        origins=draw(st.lists(NAMES, max_size=2).map(tuple)),
    )


def same(one: ExecutionGraph, other: ExecutionGraph) -> bool:
    """Equal, in the same order, with the same types of numbers inside."""
    return one == other and list(one.nodes) == list(other.nodes) and repr(sorted_sets(one)) == repr(sorted_sets(other))


def sorted_sets(graph: ExecutionGraph) -> list[Any]:
    return [(n.node_id, n.attrs, n.metadata, list(n.inputs), sorted(n.dependencies)) for n in graph.nodes.values()]


@given(data=st.data())
@settings(max_examples=120 * SCALE)
def test_text_round_trip_is_exact(lib: SimpleNamespace, data: st.DataObject) -> None:
    graph = data.draw(graphs(lib))
    text = to_text(graph)
    again = parse_text(text, lib.OpType, lib.ops)
    assert same(again, graph)
    assert to_text(again) == text


@given(data=st.data())
@settings(max_examples=60 * SCALE)
def test_json_round_trip_is_exact(lib: SimpleNamespace, data: st.DataObject) -> None:
    graph = data.draw(graphs(lib))
    assert same(from_json(to_json(graph), lib.OpType, lib.ops), graph)


@pytest.fixture
def graph(lib: SimpleNamespace) -> ExecutionGraph:
    g = GraphWriter("decode_4", level="kernel", stage="decode", dtype="f32")
    x = g.input("x", "f32", T, 64)
    with g.layer(0), g.block_scope("ffn", "L0.ffn"):
        w = g.weight("layers.0.w", "f32", 128, 64)
        (y,) = g.emit(lib.Linear, {"x": x, "w": w}, {"alpha": 0.5}, ("y",))
        a, b = g.emit(lib.Halves, {"x": y}, {}, ("a", "b"))
    g.call_block(None, lib.OpType.COMM_SEND, [b], (), (), node_id="send", dependencies=["L0.ffn.y"])
    return g.finish([a])


TEXT = """\
graph decode_4 level=kernel stage=decode layers=1
input x: f32[T, 64]
weight layers.0.w: f32[128, 64]
L0.ffn.y: f32[T, 128] = linear(x, layers.0.w) {alpha=0.5, mode=None}  @layer=0 block=ffn origins=[L0.ffn]
L0.ffn.a: f32[T, 64], L0.ffn.b: f32[T, 64] = halves(L0.ffn.y)  @layer=0 block=ffn origins=[L0.ffn]
() = COMM_SEND(L0.ffn.b)  @id=send after=[L0.ffn.y]
return L0.ffn.a
"""


def test_text_is_compact(graph: ExecutionGraph, lib: SimpleNamespace) -> None:
    verify(graph)
    assert to_text(graph) == TEXT
    assert same(parse_text(TEXT, lib.OpType, lib.ops), graph)


def test_a_missing_data_dependency_stays_missing(graph: ExecutionGraph, lib: SimpleNamespace) -> None:
    for node in graph.nodes.values():
        node.dependencies = set()
    assert same(parse_text(to_text(graph), lib.OpType, lib.ops), graph)


KEYS = "id, type, layer, block, device, stream, time_us, bytes, origins, after, needs, meta"
HEAD = "graph g level=kernel\ninput x: f32[T]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1:1: expected a graph, got an empty text"),
        ("grph g", "1:1: expected 'graph ', got 'grph g'"),
        ("graph g level=high", "1:15: level: expected one of block, kernel, got 'high'"),
        ("graph g size=3", "1:9: key: expected one of level, stage, layers, got 'size'"),
        (HEAD + "input x: f32[T]", "3:7: 'x' is already declared"),
        (HEAD + "y: f32[T] = gelu(x)", "3:13: unknown op 'gelu'"),
        (HEAD + "y: f32[T] = GELU(x)", "3:13: unknown op type 'GELU'"),
        (HEAD + "y: f32[T = FFN(x)", "3:8: 'T = FFN(x)' is not a dim formula"),
        (HEAD + "y: f32[T, 2 ** T] = FFN(x)", "3:10: '2 ** T' is not a dim formula"),
        (HEAD + "y: f32[T] = FFN(z)", "3:17: the first use of 'z' must have a type"),
        (HEAD + "y = FFN(x)", "3:3: expected ':', got '= FFN(x)'"),
        (HEAD + "y: f32[T] = FFN(x", "3:18: expected ',', got the end of the line"),
        (HEAD + "y: f32[T] = FFN(x) {k=3", "3:24: expected ',', got the end of the line"),
        (HEAD + "y: f32[T] = FFN(x) {k=what}", "3:23: expected a number, got 'what}'"),
        (HEAD + "y: f32[T] = FFN(x) {k=`T}", "3:24: the dim formula must end with `"),
        (HEAD + 'y: f32[T] = FFN(x) {k="a}', "3:23: the string is not terminated or contains an invalid escape"),
        (HEAD + "y: f32[T] = FFN(x) @layer=a", "3:27: expected a number, got 'a'"),
        (HEAD + "y: f32[T] = FFN(x) @layer=1.5", "3:27: expected an integer, got 1.5"),
        (HEAD + "y: f32[T] = FFN(x) @colour=1", f"3:21: key: expected one of {KEYS}, got 'colour'"),
        (HEAD + "y: f32[T] = FFN(x) @meta={", "3:26: metadata is not JSON"),
        (HEAD + "y: f32[T] = FFN(x) @meta=3", "3:27: metadata is not a JSON object"),
        (HEAD + "y: f32[T] = FFN(x) more", "3:20: expected the end of the node, got 'more'"),
        (HEAD + "() = FFN(x)", "3:1: a node without outputs must have an id"),
        (HEAD + "y: f32[T] = FFN(x)\ny: f32[T] = FFN(x)", "4:1: graph 'g' already has a node 'y'"),
        (HEAD + "return q", "3:8: the first use of 'q' must have a type"),
        (HEAD + "return x y", "3:10: expected the end of the return line, got 'y'"),
        (HEAD + "members late []", "3:9: set: expected one of prefill, decode, comm, got 'late'"),
    ],
)  # fmt: skip
def test_parse_errors_have_positions(lib: SimpleNamespace, text: str, message: str) -> None:
    with pytest.raises(ParseError) as caught:
        parse_text(text, lib.OpType, lib.ops)
    assert str(caught.value) == message


@given(data=st.data())
@settings(max_examples=150 * SCALE)
def test_damaged_text_raises_only_parse_errors(lib: SimpleNamespace, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(TEXT) - 1))
    until = data.draw(st.integers(at, min(at + 4, len(TEXT))))
    damaged = TEXT[:at] + data.draw(st.text(max_size=3)) + TEXT[until:]
    try:
        parse_text(damaged, lib.OpType, lib.ops)
    except ParseError as error:
        assert error.line >= 1
        assert error.column >= 1


def test_a_value_declared_under_another_name_is_refused() -> None:
    graph = ExecutionGraph("g", inputs={"x": TensorRef("y", (1,), "f32")})
    with pytest.raises(IRError, match="input 'x' is declared as 'y'"):
        to_text(graph)
