"""Tests of exports for documents, programs and browsers: complete, and safe for any names."""

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from sageLLM.runtime.core.errors import IRError, ParseError
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.order import Span, time_spans
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.passes.events import plan_events
from sageLLM.runtime.inspect.drawing import BOX_WIDTH, category, draw, layout
from sageLLM.runtime.inspect.export import (
    Step,
    from_json,
    to_chrome_trace,
    to_dot,
    to_html,
    to_json,
    to_mermaid,
    to_page,
)
from sageLLM.runtime.inspect.gantt import draw_gantt
from sageLLM.runtime.inspect.page import CATEGORIES

(T,) = dims("T")
EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'&'


@pytest.fixture
def graph(lib: SimpleNamespace) -> ExecutionGraph:
    g = GraphWriter("decode", level="kernel", stage="decode", dtype="f32")
    x = g.input("x", "f32", T, 64)
    (x,) = g.emit(lib.Scale, {"x": x}, {}, ("start",))
    for i in range(3):
        with g.layer(i):
            (x,) = g.emit(lib.Linear, {"x": x, "w": g.weight(f"layers.{i}.w", "f32", 64, 64)}, {}, ("y",))
    g.call_block(None, lib.OpType.COMM_SEND, [x], (), (), node_id="send")
    return g.finish([x])


class Page(HTMLParser):
    """The elements of a page, its scripts, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script":
            self.scripts.append(data)
        self.text += data


def test_mermaid(graph: ExecutionGraph) -> None:
    assert to_mermaid(graph) == (
        "flowchart TD\n"
        '  n0["scale<br/>start"]\n'
        '  subgraph sn1["layer 0"]\n    n1["linear<br/>L0.y"]\n  end\n'
        '  subgraph sn2["layer 1"]\n    n2["linear<br/>L1.y"]\n  end\n'
        '  subgraph sn3["layer 2"]\n    n3["linear<br/>L2.y"]\n  end\n'
        '  n4["comm_send<br/>send"]\n'
        "  n0 --> n1\n  n1 --> n2\n  n2 --> n3\n  n3 --> n4\n"
    )


def test_dot(graph: ExecutionGraph) -> None:
    text = to_dot(graph.get_subgraph(["start", "L0.y"]))
    assert text == (
        'digraph "decode" {\n  node [shape=box];\n  "start" [label="scale\\nstart"];\n'
        '  subgraph cluster_1 {\n    label="layer 0";\n    "L0.y" [label="linear\\nL0.y"];\n  }\n'
        '  "start" -> "L0.y";\n}\n'
    )


def test_odd_names_stay_inside_their_quotes(lib: SimpleNamespace) -> None:
    graph = ExecutionGraph('a"b\\')
    graph.add_node(ExecutionNode('"];x\n', lib.OpType.FFN, [], []))
    assert '["ffn<br/>#34;#93;#59;x#10;"]' in to_mermaid(graph)
    assert 'digraph "a\\"b\\\\" {' in to_dot(graph)
    assert '"\\"];x\\n" [label="ffn\\n\\"];x\\n"];' in to_dot(graph)


def test_page_draws_every_node_and_edge_of_every_graph(graph: ExecutionGraph) -> None:
    page = Page(to_html({"one": graph, "two": graph.bind(T=3)}, title="Two graphs"))
    nodes = [attrs["data-i"] for tag, attrs in page.tags if tag == "g"]
    assert nodes == ["0", "1", "2", "3", "4"] * 2
    assert [attrs["id"] for _, attrs in page.tags if attrs.get("role") == "tab"] == ["t0", "t1"]
    assert page.text.count("linear") >= 6
    details = json.loads(page.scripts[0])
    assert details[0][1]["work"] == ["8192*T flops", "512*T + 16384 bytes moved"]
    assert details[1][1]["work"] == ["24576 flops", "17920 bytes moved"]
    assert details[0][1]["inputs"] == ["start: f32[T, 64]", "layers.0.w: f32[64, 64]"]
    assert details[0][1]["read by"] == ["L1.y"]


def test_page_needs_no_network(graph: ExecutionGraph) -> None:
    html = to_html([graph])
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html.replace("<!doctype", ""))
    page = Page(html)
    assert {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object"} == set()
    assert all("src" not in attrs and "href" not in attrs for _, attrs in page.tags)


def test_names_on_the_page_are_inert(lib: SimpleNamespace) -> None:
    graph = ExecutionGraph(EVIL)
    ref = TensorRef(EVIL, (1,), "f32")
    graph.add_node(ExecutionNode(EVIL, lib.OpType.FFN, [ref], [ref], metadata={"op": EVIL, EVIL: EVIL}, block=EVIL))
    html = to_html([graph], title=EVIL)
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "img" not in {tag for tag, _ in page.tags}
    assert json.loads(page.scripts[0])[0][0]["node"] == EVIL
    assert html.count("</script>") == 2


def test_a_large_graph_folds_its_layers(graph: ExecutionGraph) -> None:
    page = Page(to_html([graph]))
    assert [("open" in attrs) for tag, attrs in page.tags if tag == "details"] == [True, True, True, False, False]


def test_no_graph_no_page() -> None:
    with pytest.raises(IRError, match="expected at least one graph to show"):
        to_html([])


def test_an_empty_graph_has_a_page() -> None:
    assert "empty: block level, 0 nodes" in Page(to_html([ExecutionGraph("empty")])).text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "1:2: Expecting property name enclosed in double quotes"),
        ("{}", "expected the JSON form of a graph: KeyError 'nodes'"),
        ("3", "expected the JSON form of a graph: TypeError 'int' object is not subscriptable"),
    ],
)
def test_json_of_something_else(lib: SimpleNamespace, text: str, message: str) -> None:
    with pytest.raises(IRError) as caught:
        from_json(text, lib.OpType, lib.ops)
    assert str(caught.value) == message
    assert isinstance(caught.value, ParseError) == (text == "{")


def test_json_is_for_other_programs(graph: ExecutionGraph) -> None:
    data = json.loads(to_json(graph.get_subgraph(["L0.y"])))
    assert data["nodes"][0]["outputs"] == [{"name": "L0.y", "dtype": "f32", "shape": ["T", 64], "device_id": 0}]
    assert data["nodes"][0]["op"] == "linear"
    assert data["decode_nodes"] == ["L0.y"]


def test_boxes_and_edges_of_a_drawing_do_not_overlap(lib: SimpleNamespace) -> None:
    """a -> b -> c -> d with a shortcut a -> d, which passes b and c."""
    chain = [
        ExecutionNode(n, lib.OpType.FFN, [], [], set(before))
        for n, before in zip("abcd", ("", "a", "b", "ca"), strict=True)
    ]
    plan = layout(chain)
    assert plan.row == {"a": 0, "b": 1, "c": 2, "d": 3}
    for node_id, row in (("b", 1), ("c", 2)):
        left, _ = plan.corner(node_id)
        assert not left <= plan.center["a", row] <= left + BOX_WIDTH
    assert draw(chain, {n: i for i, n in enumerate("abcd")}).count('class="edge"') == 4


def test_a_row_holds_boxes_side_by_side(lib: SimpleNamespace) -> None:
    nodes = [ExecutionNode(str(i), lib.OpType.FFN, [], [], {"0"} if i else set()) for i in range(5)]
    plan = layout(nodes)
    lefts = sorted(plan.corner(str(i))[0] for i in range(1, 5))
    assert all(b - a >= BOX_WIDTH for a, b in itertools.pairwise(lefts))
    assert min(lefts) >= 0


def test_every_op_type_has_a_colour(lib: SimpleNamespace) -> None:
    colours = {kind.name: category(ExecutionNode("a", kind, [], [])) for kind in lib.OpType}
    assert set(colours.values()) <= CATEGORIES.keys()
    assert (colours["DECODE_ATTN"], colours["COMM_SEND"], colours["KV_LOAD"]) == ("attn", "comm", "kv")
    assert colours["ROPE"] == "rope"


@pytest.fixture
def timed(lib: SimpleNamespace) -> ExecutionGraph:
    """A transfer parallel to a computation, and a node that waits for both."""
    graph = ExecutionGraph("timed")
    for name, stream, us, needs in (("a", 0, 4.0, ()), ("send", 1, 3.0, ("a",)), ("b", 0, 5.0, ("a",)),
                                    ("c", 0, 1.0, ("send", "b"))):  # fmt: skip
        kind = lib.OpType.COMM_SEND if stream else lib.OpType.FFN
        ref = TensorRef(name, (1,), "f32")
        graph.add_node(ExecutionNode(name, kind, [], [ref], set(needs), stream_id=stream, estimated_time_us=us))
    return graph


MEASURED = {"a": Span(0.0, 1.0), "send": Span(2.0, 9.0), "b": Span(1.0, 6.0), "c": Span(9.5, 10.0)}


def test_lanes_of_a_timeline_run_in_parallel(timed: ExecutionGraph) -> None:
    found = time_spans(timed.topological_sort())
    assert found == {"a": (0.0, 4.0), "send": (4.0, 7.0), "b": (4.0, 9.0), "c": (9.0, 10.0)}
    assert max(interval.end_us for interval in found.values()) == timed.estimate_total_time()
    assert time_spans(timed.topological_sort(), {"send": 7.0})["c"] == (11.0, 12.0)


def test_a_trace_for_perfetto_has_a_track_for_each_stream(timed: ExecutionGraph) -> None:
    plan_events(timed)
    data = json.loads(to_chrome_trace({"estimated": (timed, None), "measured": (timed, MEASURED)}))
    events = data["traceEvents"]
    names = [(e["pid"], e["tid"], e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names[:3] == [(0, 0, "estimated"), (0, 0, "device 0, stream 0"), (0, 1, "device 0, stream 1")]
    spans = {(e["pid"], e["args"]["node"]): (e["tid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans[0, "send"] == (1, 4.0, 3.0)
    assert spans[1, "b"] == (0, 1.0, 5.0)
    args = next(e["args"] for e in events if e["ph"] == "X" and e["pid"] == 1 and e["args"]["node"] == "send")
    times = {name: args[name] for name in args if name.endswith("_us")}
    assert times == {
        "planned_start_us": 4.0, "planned_us": 3.0, "measured_start_us": 2.0, "measured_us": 7.0,
    }  # fmt: skip
    flows = [(e["ph"], e["tid"], e["ts"]) for e in events if e["ph"] in "sf" and e["pid"] == 1]
    assert flows == [("s", 0, 1.0), ("f", 1, 2.0), ("s", 1, 9.0), ("f", 0, 9.5)], "send waits for a, c for send"


def test_a_page_highlights_changes(timed: ExecutionGraph) -> None:
    after = timed.copy()
    after.nodes["b"].stream_id = 2
    after.nodes["c"].dependencies.discard("send")
    del after.nodes["send"]
    after.reindex()
    page = Page(to_page({"decode": [Step("first", timed), Step("second", after, timed, "what was done")]}, "Steps"))
    highlighted = [
        attrs["data-i"] for tag, attrs in page.tags if tag == "g" and "highlighted" in (attrs["class"] or "")
    ]
    assert sorted(highlighted) == ["1", "1", "2", "2"], "b and c, in the chart and in the drawing"
    for text in ("second4 → 3 nodes", "what was done", "removed", "device 0, stream 2"):
        assert text in page.text


def test_a_page_counts_changes_without_new_nodes(timed: ExecutionGraph) -> None:
    after = timed.copy()
    after.nodes["b"].stream_id = 2
    page = Page(to_page({"decode": [Step("first", timed), Step("second", after, timed)]}, "Steps"))
    assert "second1 changed" in page.text and "second4" not in page.text


def test_bars_show_whole_names_or_say_that_they_are_clipped(lib: SimpleNamespace) -> None:
    graph = ExecutionGraph("bars")
    name = "L3.attention.output_projection"
    for number, (suffix, us) in enumerate((("_a", 60.0), ("_b", 30.0), ("_c", 8.0), ("_d", 2.0), ("_e", 0.1))):
        ref = TensorRef(name + suffix, (1,), "f32")
        node = ExecutionNode(name + suffix, lib.OpType.FFN, [], [ref], estimated_time_us=us, layer_id=3)
        graph.add_node(node)
        node.stream_id = number
    drawing = draw_gantt(graph, {node: i for i, node in enumerate(graph.nodes)})
    labels = re.findall(r'<text class="id" x="4" y="15">([^<]*)</text></g>', drawing)
    assert labels == [f"{name}_a", f"{name}_b", "ffn", "ffn", ""]


def test_the_page_works_in_a_browser(timed: ExecutionGraph, tmp_path: Path) -> None:
    """The address opens the second step and its node c; the script fills in what is known of it."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")
    path = tmp_path / "page.html"
    path.write_text(to_page({"decode": [Step("first", timed), Step("second", timed.copy(), timed)]}, "Steps"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{path}#g1/3"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert re.search(r'id="t1"[^>]*aria-selected="true"', done.stdout), done.stderr
    assert re.search(r'id="g0"[^>]*hidden', done.stdout)
    assert "<dt>node</dt><dd>c</dd>" in done.stdout
    assert "<dt>waits for</dt><dd>b</dd><dd>send</dd>" in done.stdout
