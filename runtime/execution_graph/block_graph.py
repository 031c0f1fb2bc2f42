"""The block graph of a whole model, or of one tensor-parallel rank, before it is divided into pipeline stages."""

from __future__ import annotations

from typing import Any

from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.model.layout import ModelLayout


def whole_block_graph(
    layout: ModelLayout, config: Any, stage: Stage, tp: int = 1, dtype: str = "bf16"
) -> ExecutionGraph:
    """The block graph of one step with symbolic sizes, from a config of the whole model or of one rank.

    Raises ValueError for a stage that the layout lacks, and ConfigError if `tp` does not divide the sizes.
    """
    if stage not in layout.phases:
        raise ValueError(
            f"layout '{layout.name}' has only the stage {', '.join(layout.phases)}, got {stage}: without a KV cache it "
            "reads whole sequences"
        )
    local = config if config.tp > 1 else layout.shard_config(config, tp)
    writer = GraphWriter(f"{layout.name}_{stage}", level="block", stage=stage, dtype=dtype)
    graph = writer.finish(layout.program(writer, local, stage))
    graph.model_config = local
    return graph
