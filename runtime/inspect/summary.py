"""Summary of each model's step (nodes, kernels, flops, bytes), to show the effect of a spec change.

The graphs are those of the layouts' tiny configs, bound to one small step, so the figures are exact and comparable.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sageLLM.runtime.core.ir.graph import Stage
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.inspect.rule_table import work
from sageLLM.runtime.registry.plugins import Registry

STAGES: tuple[Stage, ...] = ("prefill", "decode", "hybrid")
STEP: Mapping[str, int] = {
    "T": 64, "B": 4, "S": 4, "Td": 3, "Tp": 61, "PG": 32, "BS": 16, "MB": 8, "P": 128,
    "KV": 256, "KVd": 192, "QK": 1024, "LL": 1024, "EX": 4,
}  # fmt: skip
"""One step of 64 tokens in 4 sequences; in decode one token of each. The tokens are routed to 4 experts."""


@dataclass(frozen=True, slots=True)
class StageSummary:
    """Counts of one graph: block-level nodes, kernels (nodes that are not views), operations, bytes moved."""

    nodes: int
    kernels: int
    flops: int
    bytes: int


def summarise(registry: Registry) -> dict[str, dict[str, StageSummary]]:
    """The summaries of all models, by model and stage."""
    return {name: _of_model(layout, registry) for name, layout in registry.models.items()}


def _of_model(layout: ModelLayout, registry: Registry) -> dict[str, StageSummary]:
    config = layout.read_config(HFConfig(layout.tiny, f"{layout.name}: tests.tiny"))
    graphs = ModelGraphs(layout, config, registry, dtype="f32")
    return {stage: _of_stage(graphs, stage, config) for stage in layout.phases}


def _of_stage(graphs: ModelGraphs, stage: Stage, config: Any) -> StageSummary:
    _, kernels, flops, num_bytes = work(graphs.kernel_graph(stage).nodes.values(), step_of(stage, config))
    return StageSummary(len(graphs.block_graph(stage).nodes), kernels, flops, num_bytes)


def step_of(stage: Stage | None, config: Any) -> Mapping[str, int]:
    """The sizes of one step of a model."""
    return {**STEP, "V": config.V, **({"T": STEP["B"]} if stage == "decode" else {})}


def diff_lines(
    old: Mapping[str, Mapping[str, StageSummary]], new: Mapping[str, Mapping[str, StageSummary]]
) -> list[str]:
    """A line per changed model and stage, with the old and new figures, and per added or removed model."""
    lines = [f"model {name}: new" for name in new if name not in old]
    lines += [f"model {name}: removed" for name in old if name not in new]
    for name in (name for name in new if name in old):
        for stage, after in new[name].items():
            if (before := old[name][stage]) != after:
                lines.append(f"model {name}, {stage}: {_changes(before, after)}")
    return lines


def _changes(before: StageSummary, after: StageSummary) -> str:
    words = []
    for name in ("nodes", "kernels", "flops", "bytes"):
        a, b = getattr(before, name), getattr(after, name)
        if a != b:
            words.append(f"{name} {a:,} -> {b:,}" + (f" ({(b - a) / a:+.1%})" if a else ""))
    return ", ".join(words)
