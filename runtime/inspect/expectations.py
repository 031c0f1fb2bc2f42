"""Compares the number of times that rules fire in every model with the counts that the specs expect.

Requires neither torch nor weights: builders and passes work on graphs of the models' tiny configs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sageLLM.runtime.core.errors import ConfigError
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


@dataclass(frozen=True, slots=True)
class UnbuiltModel:
    """A model that cannot be built from its `tests.tiny`: the config is refused, or (with a stage) a graph fails."""

    model: str
    stage: Stage | None
    error: str


Finding = MissedExpectation | UnbuiltModel


def missed_expectations(tree: Path, is_overlay: bool = False) -> list[Finding]:
    """The misses of the tree's passes, for each model in the first stage that differs, and the tree's unbuilt models.

    An overlay runs together with the package's entries, and may change their counts; any other tree runs alone.
    """
    own = load_tree(tree)
    return missed_in(load_registry([tree]) if is_overlay else own, own.passes, own.models)


def missed_in(
    registry: Registry, own: Mapping[str, type[OptimizationPass]], built: Iterable[str] = ()
) -> list[Finding]:
    """The misses of the passes `own` in the models of the registry. The models `built` are built in any case."""
    models = {name for one in own.values() if issubclass(one, RewritePass) for name in one.expect}
    found: dict[tuple[str, str], Finding] = {}
    for model in registry.models if "*" in models else models.union(built):
        for one in _findings(registry, model):
            if isinstance(one, UnbuiltModel):
                found["", model] = one
            elif one.pass_name in own:
                found.setdefault((one.pass_name, model), one)
    return list(found.values())


def _findings(registry: Registry, model: str) -> Iterator[Finding]:
    layout, stage = registry.models[model], None
    try:
        config = layout.read_config(HFConfig(layout.tiny, "tests.tiny"))
        graphs = ModelGraphs(layout, config, registry, dtype="f32")
        for stage in layout.phases:
            graph = graphs.expanded_graph(stage)
            for one in graphs.rewrite_passes("kernel"):
                one.transform(graph)
                yield from _difference(one, model, stage, config)
    except Exception as error:  # a layout is the user's: whatever it raises is a finding about it
        is_plain = isinstance(error, ConfigError)
        yield UnbuiltModel(model, stage, str(error) if is_plain else f"{type(error).__name__}: {error}")


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
