"""Compares the number of times that rules fire in every model with the counts that the specs expect.

Requires neither torch nor weights: builders and passes work on graphs of the models' tiny configs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.ir.graph import Stage
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.passes.base import OptimizationPass
from sageLLM.runtime.core.passes.rewrite import RewritePass
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.registry.plugins import Registry, load_registry, load_tree


@dataclass(frozen=True, slots=True)
class MissedExpectation:
    """A pass that fires more or less often than expected; `reasons` explain where it fired, or why it did not."""

    pass_name: str
    model: str
    stage: Stage
    fired: int
    expected: int
    reasons: tuple[str, ...]


def missed_expectations(tree: Path, is_overlay: bool = False) -> list[MissedExpectation]:
    """The misses of the tree's passes, for each model in the first stage that differs.

    An overlay runs together with the package's entries, and may change their counts; any other tree runs alone.
    """
    return missed_in(load_registry([tree]) if is_overlay else load_tree(tree), load_tree(tree).passes)


def missed_in(registry: Registry, own: Mapping[str, type[OptimizationPass]]) -> list[MissedExpectation]:
    """The misses of the passes `own` in the models of the registry."""
    models = {name for one in own.values() if issubclass(one, RewritePass) for name in one.expect}
    found: dict[tuple[str, str], MissedExpectation] = {}
    for model in registry.models if "*" in models else models:
        for missed in _missed(registry, model):
            if missed.pass_name in own:
                found.setdefault((missed.pass_name, model), missed)
    return list(found.values())


def _missed(registry: Registry, model: str) -> Iterator[MissedExpectation]:
    layout = registry.models[model]
    config = layout.read_config(HFConfig(layout.tiny, f"{model}: tests.tiny"))
    graphs = ModelGraphs(layout, config, registry, dtype="f32")
    for stage in layout.phases:
        graph = graphs.expanded_graph(stage)
        for one in graphs.rewrite_passes("kernel"):
            one.transform(graph)
            yield from _difference(one, model, stage, config)


def _difference(one: RewritePass, model: str, stage: Stage, config: Any) -> Iterator[MissedExpectation]:
    count = one.expect.get(model, one.expect.get("*"))
    if count is None or stage not in one.phases or count(config) == one.report.fired:
        return
    reasons = [f"{rule} {line}" for rule, stats in one.report.rules.items() for line in stats.explain_near_misses()]
    fired = [f"{rule} fired at {c.new[-1].node_id}" for rule, s in one.report.rules.items() for c in s.changes]
    too_many = one.report.fired > count(config)
    yield MissedExpectation(
        one.name, model, stage, one.report.fired, count(config), tuple(fired if too_many else reasons)
    )
