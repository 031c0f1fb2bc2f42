"""Traces of a model for the HTML page: its graphs after each pass, with estimated times, and two-device streams."""

from collections.abc import Iterable, Sequence

from sageLLM.generated.passes.comm import CommFusion
from sageLLM.generated.passes.schedule import ComputeCommOverlap, KvPrefetch
from sageLLM.runtime.core.cost import Hardware, annotate
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.inspect.export import Step
from sageLLM.runtime.inspect.summary import step_of

RANKS = 2
"""Tensor-parallel degree of the stream traces: a single device does not communicate."""


def traces_of(graphs: ModelGraphs, hardware: Hardware, stages: Sequence[Stage]) -> dict[str, list[Step]]:
    """For each stage the kernel-level passes, and the passes over streams if two ranks divide the model's sizes."""
    found: dict[str, list[Step]] = {}
    for stage in stages:
        found[stage] = _kernel_trace(graphs, hardware, stage)
        if streams := _stream_trace(graphs, hardware, stage):
            found[f"{stage} on {RANKS} devices, blocks"] = streams
    return found


def _kernel_trace(graphs: ModelGraphs, hardware: Hardware, stage: Stage) -> list[Step]:
    start = graphs.expanded_graph(stage)
    annotate(start, hardware, step_of(stage, graphs.config))
    steps = [Step("expanded", start)]
    for one, after in graphs.steps(start):
        annotate(after, hardware, step_of(stage, graphs.config))
        steps.append(Step(one.name, after, steps[-1].graph, str(one.report)))
    return steps


def _stream_trace(graphs: ModelGraphs, hardware: Hardware, stage: Stage) -> list[Step]:
    """The stream passes over the block graph; empty if the model cannot be divided."""
    try:
        parallel = ParallelConfig(RANKS)
        graph = build_block_graph(graphs.layout, graphs.config, stage, parallel, graphs.dtype)
    except ConfigError:
        return []
    annotate(graph, hardware, {**step_of(stage, graphs.config), "tp": RANKS})
    return [Step("blocks", graph), *_after_each([CommFusion(hardware), ComputeCommOverlap(), KvPrefetch()], graph)]


def _after_each(passes: Iterable[DeclaredPass], graph: ExecutionGraph) -> Iterable[Step]:
    for one in passes:
        after = one.apply(graph)
        yield Step(one.name, after, graph, str(one.report))
        graph = after
