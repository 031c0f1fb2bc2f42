"""Rewrites that replace a result by another value of the graph: `y = x`."""

from __future__ import annotations

import pytest

from sageLLM.generated.ops import OPS
from sageLLM.generated.ops.elementwise import Scale
from sageLLM.generated.ops.op_types import OpType
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.text import parse_text, to_text
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.rewrite import RewritePass
from sageLLM.runtime.core.rewrite.rules import NearMiss, Rewrite, Rule


def without_factor(graph: ExecutionGraph, node: OpNode) -> Rewrite | NearMiss | None:
    """scale(x, factor=1.0) -> x"""
    if not isinstance(node, Scale) or node.factor != 1.0:
        return None
    return Rewrite((node,), (), kept=(node.y,), same=((node.y, node.x),))


class Tidy(RewritePass):
    """The pass of this test."""

    pass_name = "tidy"
    rules = (Rule("without_factor", Scale, without_factor, 1),)


def rewritten(lines: str) -> tuple[str, list[str]]:
    """The graph after the pass, without its header, and the reasons of near misses."""
    graph = parse_text(f"graph g level=kernel\n{lines}", OpType, OPS)
    verify(graph)
    one = Tidy()
    after = one.apply(graph)
    verify(after)
    stats = one.report.rules["without_factor"]
    return to_text(after).partition("\n")[2], [miss.reason for miss in stats.near_misses.values()]


def test_consumers_and_the_caller_read_the_value_itself() -> None:
    text, _ = rewritten(
        "input x: f32[4, 8]\n"
        "a: f32[4, 8] = add(x, x)\n"
        "y: f32[4, 8] = scale(a) {factor=1.0}\n"
        "z: f32[4, 8] = scale(y) {factor=1.0}\n"
        "b: f32[4, 8] = add(y, z)\n"
        "return b, z\n"
    )
    assert text == (
        "input x: f32[4, 8]\n"
        "a: f32[4, 8] = add(x, x)\n"
        "b: f32[4, 8] = add(a, a)\n"
        "return b, a\n"
    )  # fmt: skip


OVERWRITTEN = {
    "itself": "r: f32[4, 8], h: f32[4, 8] = fused_add_rms_norm(x, y)\n",
    "a view of it": "q: f32[4, 2, 4] = split_heads(y) {N=2, D=4}\nr: f32[4, 2, 4] = rope(q, pos, cos, sin)\n",
}


@pytest.mark.parametrize("lines", OVERWRITTEN.values(), ids=OVERWRITTEN)
def test_a_result_that_a_consumer_overwrites_is_kept(lines: str) -> None:
    """The consumer would overwrite x, which others may read later."""
    inputs = "input x: f32[4, 8]\ninput pos: i32[4]\ninput cos: f32[16, 2]\ninput sin: f32[16, 2]\n"
    text, reasons = rewritten(f"{inputs}y: f32[4, 8] = scale(x) {{factor=1.0}}\n{lines}return r\n")
    assert "scale(x)" in text
    assert reasons == ["r overwrites y, and would overwrite x"]
