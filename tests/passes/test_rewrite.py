"""Text cases of rewriting: a graph before, the graph after, and the report of the pass.

A case is a folder of `cases/PASS` with `before.txt`; `after.txt` and `report.txt` are expected. SAGELLM_ACCEPT=1
rewrites both. The rest of the file tests the driver with constructed rules.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sageLLM.generated.ops import OPS
from sageLLM.generated.ops.elementwise import Add
from sageLLM.generated.ops.norm import RmsNorm
from sageLLM.generated.ops.op_types import OpType
from sageLLM.generated.passes import PASSES
from sageLLM.generated.passes.fusion import FuseNorm
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.text import parse_text, to_text
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.rewrite import RewriteOptions, RewritePass
from sageLLM.runtime.core.rewrite.rules import NearMiss, NewCall, Rewrite, Rule
from sageLLM.runtime.execution_graph.rewriting import Rewriting
from sageLLM.runtime.registry.plugins import load_registry

CASES = sorted(path.parent for path in (Path(__file__).parent / "cases").glob("*/*/before.txt"))
ACCEPT = os.environ.get("SAGELLM_ACCEPT") == "1"


def parse(text: str) -> ExecutionGraph:
    graph = parse_text(text, OpType, OPS)
    verify(graph)
    return graph


def rewrite_and_compare(one: RewritePass, folder: Path) -> None:
    """Applies the pass to `before.txt`; the result is `after.txt`, valid, and the tried rules report `report.txt`."""
    before = parse((folder / "before.txt").read_text(encoding="utf-8"))
    text = to_text(before)
    after = one.apply(before)
    verify(after)
    assert to_text(before) == text, "the argument was changed"
    found = {
        "after.txt": to_text(after),
        "report.txt": "".join(f"{rule} {stats}\n" for rule, stats in one.report.rules.items() if stats.tried),
    }
    for name, content in found.items():
        if ACCEPT:
            (folder / name).write_text(content, encoding="utf-8")
        assert content == (folder / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}: {folder.name}")
def test_before_and_after(folder: Path) -> None:
    made = PASSES[folder.parent.name]
    assert issubclass(made, RewritePass)
    rewrite_and_compare(made(), folder)


CHAIN = """graph g level=kernel
input x: f32[4, 8]
a: f32[4, 8] = add(x, x)
b: f32[4, 8] = add(a, x)
c: f32[4, 8] = add(b, x)
d: f32[4, 8] = add(c, x)
return d
"""


def drop_first(graph: ExecutionGraph, node: OpNode) -> Rewrite | NearMiss | None:
    """add(add(x, y), z) -> add(x, z), which is nonsense, but shrinks."""
    assert isinstance(node, Add)
    inner = graph.producer(node.x)
    if not isinstance(inner, Add):
        return NearMiss(1, "no add before it")
    return Rewrite((inner, node), (NewCall(Add, {"x": inner.x, "y": node.y}, {}, (node.z,)),), (node.z,))


def turn(graph: ExecutionGraph, node: OpNode) -> Rewrite | NearMiss | None:
    """add(x, y) -> add(y, x), for ever."""
    assert isinstance(node, Add)
    return Rewrite((node,), (NewCall(Add, {"x": node.y, "y": node.x}, {}, (node.z,)),), (node.z,))


def pass_of(*rules: Rule) -> RewritePass:
    members: dict[str, Any] = {"pass_name": "made_here", "rules": rules}
    made: type[RewritePass] = type("MadeHere", (RewritePass,), members)
    return made()


def test_rules_run_until_none_fires() -> None:
    one = pass_of(Rule("drop_first", Add, drop_first, 2))
    after = one.apply(parse(CHAIN))
    verify(after)
    assert [node.node_id for node in after.nodes.values()] == ["d"]
    assert str(one.report.rules["drop_first"]) == "fired 3 of 4; 1 near misses, 1 of them: no add before it"
    assert after.nodes["d"].origins == ("a", "b", "c", "d")


def test_a_rule_that_never_settles_is_stopped() -> None:
    one = pass_of(Rule("turn", Add, turn, 1))
    verify(one.apply(parse(CHAIN)))


def test_the_greater_benefit_is_tried_first() -> None:
    low, high = Rule("low", Add, drop_first, 2, 1), Rule("high", Add, drop_first, 2, 5)
    one = pass_of(low, high)
    one.apply(parse(CHAIN))
    assert {name: stats.fired for name, stats in one.report.rules.items()} == {"low": 0, "high": 3}


def test_a_value_that_is_not_kept_and_read_elsewhere_refuses_the_rule() -> None:
    one = pass_of(Rule("drop_first", Add, drop_first, 2))
    after = one.apply(parse(CHAIN.replace("return d", "return d, b")))
    verify(after)
    assert one.report.fired == 2
    assert one.report.rules["drop_first"].reasons == {"no add before it": 1, "b is also read by the caller": 1}


def test_a_replacement_that_reads_a_removed_value_is_refused() -> None:
    one = pass_of(Rule("drop_first", Add, drop_first, 2))
    after = one.apply(parse(CHAIN[: CHAIN.index("c:")].replace("add(a, x)", "add(a, a)") + "return b\n"))
    verify(after)
    reason = "the replacement reads a, which it removes"
    assert one.report.rules["drop_first"].reasons == {"no add before it": 1, reason: 1}


def test_a_replacement_of_another_type_is_refused() -> None:
    """silu_mul halves the last dim."""

    def gate(graph: ExecutionGraph, node: OpNode) -> Rewrite:
        assert isinstance(node, Add)
        return Rewrite((node,), (NewCall(OPS["silu_mul"], {"gu": node.x}, {}, (node.z,)),), (node.z,))

    one = pass_of(Rule("gate", Add, gate, 1))
    verify(one.apply(parse(CHAIN)))
    assert one.report.fired == 0
    assert one.report.rules["gate"].reasons == {
        f"silu_mul produces {name}: f32[4, 4], expected f32[4, 8]": 1 for name in "abcd"
    }


def test_a_replacement_that_would_wait_for_itself_is_refused() -> None:
    """The weight of y's norm depends on h: the fused op would read the weight before it produces h."""

    def fuse(graph: ExecutionGraph, node: OpNode) -> Rewrite | NearMiss | None:
        add = graph.producer(node.input("x"))
        if not isinstance(add, Add):
            return None
        fused = OPS["fused_add_rms_norm"]
        operands = {"x": add.x, "residual": add.y, "w": node.input("w")}
        return Rewrite((add, node), (NewCall(fused, operands, {}, (node.outputs[0], add.z)),), (node.outputs[0], add.z))

    graph = parse(CHAIN.replace("return d", "return y")[: CHAIN.index("b:")])
    x = graph.inputs["x"]
    one = pass_of(Rule("fuse", RmsNorm, fuse, 2))
    w = one_row(graph, "a")
    graph.add_node(RmsNorm("y", RmsNorm.kind, [graph.nodes["a"].outputs[0], w], [like(x, "y")], attrs={"eps": 1e-06}))
    graph.outputs = [like(x, "y")]
    verify(graph)
    after = one.apply(graph)
    assert after.nodes.keys() == graph.nodes.keys()
    assert one.report.rules["fuse"].reasons == {"an operand depends on a value of the pattern itself": 1}


def like(ref: Any, name: str) -> Any:
    return type(ref)(name, ref.shape, ref.dtype)


def one_row(graph: ExecutionGraph, source: str) -> Any:
    """A plain node that makes a weight-shaped value from another value."""
    from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef

    w = TensorRef("w", (8,), "f32")
    graph.add_node(ExecutionNode("w", OpType.GATHER, [graph.nodes[source].outputs[0]], [w]))
    return w


def test_phases_and_expectations() -> None:
    members: dict[str, Any] = {"phases": frozenset({"decode"}), "expect": {"llama": lambda c: 2 * c, "*": lambda c: 0}}
    made: type[RewritePass] = type("DecodeOnly", (FuseNorm,), members)
    graph = parse(
        (Path(__file__).parent / "cases" / "fuse_norm" / "a_sum_before_a_norm" / "before.txt").read_text(
            encoding="utf-8"
        )
    )
    graph.stage = "prefill"
    one = made()
    one.apply(graph)
    assert one.report.fired == 0
    assert one.why_not_expected("qwen3", 5) is None
    graph.stage = "decode"
    one.apply(graph)
    assert one.why_not_expected("llama", 3) == "fuse_norm fired 1 times on llama, expected 6"


def test_a_pass_that_fires_more_often_than_expected_is_reported() -> None:
    path = Path(__file__).parent / "cases/fuse_norm/a_sum_before_a_norm/before.txt"
    graph = parse(path.read_text(encoding="utf-8"))
    for count, message in ((0, "fuse_norm fired 1 times on llama, expected 0"), (1, None)):
        members: dict[str, Any] = {"expect": {"llama": lambda c, count=count: count}}
        one = type("Counted", (FuseNorm,), members)()
        one.apply(graph)
        assert one.why_not_expected("llama", None) == message


ABSORB = Path(__file__).parents[1] / "codegen/cases/good/pass_optional_operands/expected/passes/spec.py"


@pytest.mark.parametrize(
    ("line", "second", "rule"),
    [
        ("linear(x, w)", "gelu(h)", "without_bias"),
        ("linear(x, w, b)", "gelu(h)", None),
        ("linear(x, w, b)", "gelu(s)", "with_bias"),
        ("linear(x, w)", "gelu(s)", "without_bias"),
    ],
)
def test_optional_operands_are_matched_as_the_pattern_names_them(line: str, second: str, rule: str | None) -> None:
    """The rules are those of a case of the generator, which checks that the file is what it generates."""
    namespace: dict[str, Any] = {}
    exec(compile(ABSORB.read_text(encoding="utf-8"), str(ABSORB), "exec"), namespace)
    between = "s: f32[4, 8] = gelu(h)\n" if "s" in second else ""
    graph = parse(
        "graph g level=kernel\ninput x: f32[4, 8]\nweight w: f32[8, 8]\nweight b: f32[8]\n"
        f"h: f32[4, 8] = {line}\n{between}y: f32[4, 8] = {second}\nreturn y\n"
    )
    one = namespace["Absorb"]()
    verify(one.apply(graph))
    assert {name: stats.fired for name, stats in one.report.rules.items() if stats.fired} == ({rule: 1} if rule else {})


def test_a_rule_requires_kernels_for_its_new_ops() -> None:
    rule = Rule("drop_first", Add, drop_first, 2)
    made: type[RewritePass] = type("MadeHere", (RewritePass,), {"pass_name": "made_here", "rules": (rule,)})
    for kernels, fired in ((("rms_norm",), 0), (("add",), 3), (None, 3)):
        one = made(RewriteOptions(kernels))
        one.apply(parse(CHAIN))
        assert one.report.fired == fired
    one = made(RewriteOptions(kernels=()))
    one.apply(parse(CHAIN))
    assert one.report.rules["drop_first"].reasons["the device lacks a kernel for add"] == 3


def test_rules_are_chosen_and_counted() -> None:
    rule = Rule("drop_first", Add, drop_first, 2)
    made: type[RewritePass] = type("MadeHere", (RewritePass,), {"pass_name": "made_here", "rules": (rule,)})
    options = [RewriteOptions(disable=["drop_first"]), RewriteOptions(only=[]), RewriteOptions(limit=2)]
    fired = []
    for one in map(made, options):
        one.apply(parse(CHAIN))
        fired.append(one.report.fired)
    assert fired == [0, 0, 2]
    assert options[2].limit == 0


def test_statistics_list_changes_and_near_misses() -> None:
    one = pass_of(Rule("drop_first", Add, drop_first, 2))
    one.apply(parse(CHAIN.replace("return d", "return d, b")))
    stats = one.report.rules["drop_first"]
    assert [[node.node_id for node in change.old] for change in stats.changes] == [["a", "b"], ["c", "d"]]
    assert [[node.node_id for node in change.new] for change in stats.changes] == [["b"], ["d"]]
    assert (stats.tried, stats.matched, stats.seconds > 0) == (4, 3, True)
    assert list(stats.explain_near_misses()) == [
        "matched 1 of 2 nodes at b: no add before it",
        "matched 2 of 2 nodes at d: b is also read by the caller",
    ]


def test_a_bounded_rule_fires_so_often_and_no_more() -> None:
    one = pass_of(Rule("turn", Add, turn, 1, bounded=2))
    verify(one.apply(parse(CHAIN)))
    assert one.report.fired == 2
    assert one.report.rules["turn"].reasons == {"it fires at most 2 times": 4}


def test_a_pass_for_some_kernels_runs_for_these_and_if_it_is_named() -> None:
    """`fuse_row_prologue` has `kernels: [triton]`: elsewhere a norm that is computed again would cost more."""
    registry = load_registry()
    found = [Rewriting(registry, **choice) for choice in ({}, {"backend": "cpu"}, {"backend": "triton"})]
    found.append(Rewriting(registry, only=["rms_norm_linear"]))
    names = [{one.name for one in each.rewrite_passes("kernel")} for each in found]
    assert ["fuse_row_prologue" in each for each in names] == [False, False, True, True]
    assert names[1] | {"fuse_row_prologue"} == names[2]
