"""Explanation why a rewrite rule did not fire at a node of a graph, or where it did."""

from collections.abc import Sequence

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.passes.base import PassReport
from sageLLM.runtime.core.passes.rewrite import RewritePass
from sageLLM.runtime.core.rewrite.rules import Rule
from sageLLM.runtime.core.rewrite.stats import Change
from sageLLM.runtime.execution_graph.rewriting import Rewriting


def why_not(rewriting: Rewriting, graph: ExecutionGraph, rule_name: str, node_id: str) -> str:
    """The answer for a rule and a node of the graph before or after passes; ValueError for an unknown name.

    For a node of another op than the rule's anchor, the answer is about the nearest downstream anchors.
    """
    earlier: list[PassReport] = []
    known = set(graph.nodes)
    for one, after in rewriting.steps(graph):
        rule = next((rule for rule in one.rules if rule.name == rule_name), None)
        if rule is not None:
            return _answer(one, rule, graph, node_id, earlier, known)
        earlier.append(one.report)
        graph, known = after, known | set(after.nodes)
    raise ValueError(f"unknown or disabled rule {rule_name}")


def _answer(
    one: RewritePass, rule: Rule, graph: ExecutionGraph, node_id: str, earlier: list[PassReport], known: set[str]
) -> str:
    if node_id not in graph.nodes:
        if (replaced := _replaced_by(node_id, earlier)) is not None:
            return f"{node_id} was replaced before {one.name}: {replaced}"
        if node_id not in known:
            raise ValueError(f"unknown node {node_id}; `sagellm graph MODEL --only ''` lists them")
    if rule.name not in one.report.rules:
        return f"{rule.name} is disabled"
    anchors = _anchors(graph, graph.nodes[node_id], rule)
    if not anchors:
        op = graph.nodes[node_id].op
        return f"{rule.name} starts at {rule.anchor.op}; {node_id} is {op}, without a {rule.anchor.op} downstream"
    return "\n".join(_at(anchor, one.report, rule) for anchor in anchors)


def _at(anchor: ExecutionNode, report: PassReport, rule: Rule) -> str:
    stats = report.rules[rule.name]
    if (miss := stats.near_misses.get(anchor.node_id)) is not None:
        return f"{rule.name} at {anchor.node_id} matched {miss.num_matched} of {rule.num_nodes} nodes: {miss.reason}"
    if (change := _change_of(anchor.node_id, stats.changes)) is not None:
        return f"{rule.name} fired at {anchor.node_id}: {_describe(change)}"
    replaced = _replaced_by(anchor.node_id, [report])
    return f"{rule.name} at {anchor.node_id} was too late: {replaced or 'the node was not reached'}"


def _anchors(graph: ExecutionGraph, node: ExecutionNode, rule: Rule, depth: int = 4) -> Sequence[ExecutionNode]:
    """The node itself, or its nearest downstream nodes of the rule's anchor op."""
    layer: dict[str, ExecutionNode] = {node.node_id: node}
    for _ in range(depth):
        if found := [one for one in layer.values() if type(one) is rule.anchor]:
            return found
        layer = {user.node_id: user for one in layer.values() for ref in one.outputs for user in graph.users(ref)}
    return []


def _replaced_by(node_id: str, reports: list[PassReport]) -> str | None:
    for report in reports:
        for name, stats in report.rules.items():
            if (change := _change_of(node_id, stats.changes)) is not None:
                return f"{name} of {report.name} made {_describe(change)}"
    return None


def _change_of(node_id: str, changes: list[Change]) -> Change | None:
    return next((change for change in changes if node_id in [node.node_id for node in change.old]), None)


def _describe(change: Change) -> str:
    old, new = ([f"{node.op} {node.node_id}" for node in nodes] for nodes in change)
    return f"{' + '.join(old)} -> {' + '.join(new)}"
