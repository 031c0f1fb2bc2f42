"""Explanation of one node of a model's graph: its op, cost and origins, and the rules that matched it."""

from collections.abc import Iterator, Mapping

from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.base import PassReport
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.inspect.summary import step_of


def explain_node(graphs: ModelGraphs, stage: Stage, node_id: str) -> str:
    """The node after the passes, or before the pass that replaced it; LookupError for an unknown node."""
    graph = graphs.expanded_graph(stage)
    found = (node, graph) if (node := graph.nodes.get(node_id)) else None
    reports: list[PassReport] = []
    for one, after in graphs.steps(graph):
        reports.append(one.report)
        if (node := after.nodes.get(node_id)) is not None:
            found = node, after
    if found is None:
        raise LookupError(
            f"unknown node {node_id} in the {stage} graph of {graphs.layout.name}; `sagellm graph` lists them"
        )
    head = f"node {node_id} of {graphs.layout.name}, {stage}"
    return "\n".join([head, "", *_facts(*found, step_of(stage, graphs.config)), *_history(node_id, reports)])


def _facts(node: ExecutionNode, graph: ExecutionGraph, step: Mapping[str, int]) -> Iterator[str]:
    yield f"  {', '.join(map(str, node.outputs))} = {node.op}({', '.join(map(str, node.inputs))})"
    if node.attrs:
        yield f"  attrs      {', '.join(f'{name}={value}' for name, value in node.attrs.items())}"
    if isinstance(node, OpNode):
        yield f"  spec       {node.spec}"
        yield f"  work       {node.flops()} flops, {node.bytes_moved()} bytes moved"
        yield f"             {node.flops(step)} and {node.bytes_moved(step)} in a step of {step['T']} tokens"
    part_of = [f"layer {node.layer_id}"] if node.layer_id is not None else []
    part_of += [f"block {node.block}"] if node.block else []
    if part_of:
        yield f"  part of    {', '.join(part_of)}"
    if node.origins:
        yield f"  origins    {', '.join(node.origins)}"
    yield f"  waits for  {', '.join(sorted(node.dependencies)) or 'nothing'}"
    users = dict.fromkeys(user.node_id for ref in node.outputs for user in graph.users(ref))
    returned = [ref.name for ref in graph.outputs if ref in node.outputs]
    yield f"  read by    {', '.join([*users, *(['the caller'] if returned else [])]) or 'nothing'}"


def _history(node_id: str, reports: list[PassReport]) -> Iterator[str]:
    for report in reports:
        for rule, stats in report.rules.items():
            for change in stats.changes:
                if node_id in [node.node_id for node in (*change.old, *change.new)]:
                    old, new = (" + ".join(f"{node.op} {node.node_id}" for node in nodes) for nodes in change)
                    yield f"  {report.name}: {rule} replaced {old} by {new}"
            if (miss := stats.near_misses.get(node_id)) is not None:
                yield f"  {report.name}: {rule} matched {miss.num_matched} of {stats.num_nodes} nodes: {miss.reason}"
