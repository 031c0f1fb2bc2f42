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
    """The changes of models, with one line for all models that have the same change.

    Equal changes add or remove as many nodes and kernels in the same stages, and change operations and bytes by the
    same share. A model with its own change has a line per stage with the old and new figures.
    """
    lines = [f"model {name}: new" for name in new if name not in old]
    lines += [f"model {name}: removed" for name in old if name not in new]
    groups: dict[str, list[str]] = {}
    for name in (name for name in new if name in old):
        if change := _relative_change(old[name], new[name]):
            groups.setdefault(change, []).append(name)
    for change, names in groups.items():
        if len(names) > 1:
            lines.append(f"{len(names)} models, {change}: {', '.join(names)}")
            continue
        (name,) = names
        for stage, after in new[name].items():
            before = old[name].get(stage)
            if before is None:
                lines.append(f"model {name}: new stage {stage}")
            elif before != after:
                lines.append(f"model {name}, {stage}: {_changes(before, after)}")
    return lines


def _relative_change(old: Mapping[str, StageSummary], new: Mapping[str, StageSummary]) -> str:
    """The change of all stages as text without absolute figures; empty without a change."""
    stages: dict[str, list[str]] = {}
    for stage, after in new.items():
        before = old.get(stage)
        words = ["new"] if before is None else _differences(before, after)
        if words:
            stages.setdefault(", ".join(words), []).append(stage)
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in stages.items())


def _differences(before: StageSummary, after: StageSummary) -> list[str]:
    counts = {name: getattr(after, name) - getattr(before, name) for name in ("nodes", "kernels")}
    words = [f"{name} {difference:+d}" for name, difference in counts.items() if difference]
    for name in ("flops", "bytes"):
        a, b = getattr(before, name), getattr(after, name)
        if a != b:
            words.append(f"{name} {(b - a) / a:+.1%}" if a else f"{name} {b - a:+,}")
    return words


def _changes(before: StageSummary, after: StageSummary) -> str:
    words = []
    for name in ("nodes", "kernels", "flops", "bytes"):
        a, b = getattr(before, name), getattr(after, name)
        if a != b:
            words.append(f"{name} {a:,} -> {b:,}" + (f" ({(b - a) / a:+.1%})" if a else ""))
    return ", ".join(words)
