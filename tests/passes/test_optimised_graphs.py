"""Snapshots of every model after the passes: the rules that fired, and the ops of each stage's graph by layer."""

import pytest
from syrupy.assertion import SnapshotAssertion

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.cli.graph import GraphRequest, show_graph
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.registry.plugins import load_registry

REGISTRY = load_registry()


@pytest.mark.parametrize("name", MODELS)
def test_optimised_graph(name: str, text_file: SnapshotAssertion) -> None:
    layout = MODELS[name]
    graphs = ModelGraphs(layout, layout.read_config(HFConfig(layout.tiny)), REGISTRY, dtype="f32")
    assert "\n".join(outline(graphs, stage) for stage in layout.phases) == text_file


def outline(graphs: ModelGraphs, stage: Stage) -> str:
    """The rules that fired, by pass, and the ops by layer; views, which run nothing, in brackets."""
    graph = graphs.kernel_graph(stage)
    fired = [
        f"  {report.name}: {', '.join(f'{name} {s.fired}' for name, s in report.rules.items() if s.fired)}"
        for report in graphs.reports[stage]
        if report.fired
    ]
    return "\n".join([stage, *fired, *ops_by_layer(graph)]) + "\n"


def ops_by_layer(graph: ExecutionGraph) -> list[str]:
    lines: list[str] = []
    layer: int | None = -1
    for node in graph.topological_sort():
        if node.layer_id != layer:
            layer = node.layer_id
            lines.append(f"  {'-' if layer is None else f'L{layer}'}:")
        lines[-1] += f" [{node.op}]" if isinstance(node, OpNode) and node.is_view else f" {node.op}"
    return lines


def test_graph_text_after_each_pass(capsys: pytest.CaptureFixture[str], text_file: SnapshotAssertion) -> None:
    """The whole text of one model, as `sagellm graph` shows what passes change in it."""
    assert show_graph(GraphRequest("qwen3", "decode", diff=True)) == 0
    assert capsys.readouterr().out == text_file
