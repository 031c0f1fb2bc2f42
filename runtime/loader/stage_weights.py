"""The weights of a pipeline stage."""

from dataclasses import replace
from typing import Any

from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.weights import WeightSpec
from sageLLM.runtime.execution_graph.builder import build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.execution_graph.stages import PipelineStage, stage_graph


def weights_of_stage(layout: ModelLayout, config: Any, stage: PipelineStage) -> list[WeightSpec]:
    """Those of a layout's weights that the graphs of a stage read.

    A weight that is tied to one of another stage is read from the checkpoint here, too.
    """
    specs = list(layout.weights(config))
    if stage.count == 1:
        return specs
    read: set[str] = set()
    for phase in layout.phases:
        graph = stage_graph(build_block_graph(layout, config, phase), stage)
        read |= expand(graph, layout, config).weights.keys()
    by_name = {spec.name: spec for spec in specs}
    found = []
    for spec in specs:
        if spec.name not in read:
            continue
        if spec.tied_to is not None and spec.tied_to not in read:
            spec = replace(by_name[spec.tied_to], name=spec.name)
        found.append(spec)
    return found
