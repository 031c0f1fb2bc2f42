"""Passes over execution graphs, and the driver of rewrite rules: it runs them until none applies, and counts it all."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph, Level, Stage
from sageLLM.runtime.core.ir.nodes import OpNode
from sageLLM.runtime.core.rewrite.replacement import Memo, apply_rewrite
from sageLLM.runtime.core.rewrite.report import Change, PassReport, RuleStats
from sageLLM.runtime.core.rewrite.rules import (
    NearMiss,
    NewCall,
    Rewrite,
    Rule,
    giver,
    has_default,
    is_known,
    reader_of,
    readers,
    size_of,
)

__all__ = [
    "DeclaredPass",
    "NearMiss",
    "NewCall",
    "OptimizationPass",
    "PassReport",
    "Rewrite",
    "RewriteOptions",
    "RewritePass",
    "Rule",
    "giver",
    "has_default",
    "is_known",
    "reader_of",
    "readers",
    "size_of",
]

MAX_ROUNDS = 8
"""Rounds over the graph. Rules are checked to shrink it, so a fixpoint is reached long before."""


class OptimizationPass(ABC):
    """A named transformation. `apply` returns a valid graph and leaves the one that it is given as it was.

    `stage` and `level` say where in the pipeline it runs, `phases` on the graphs of which phases; `after` and `before`
    name the passes between which it stands.
    """

    spec: ClassVar[str] = ""
    stage: ClassVar[str] = "fuse"
    level: ClassVar[Level] = "kernel"
    phases: ClassVar[frozenset[Stage]] = frozenset({"prefill", "decode", "hybrid"})
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """How reports and switches call the pass."""

    @abstractmethod
    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        """The transformed graph."""


class DeclaredPass(OptimizationPass):
    """A pass that a spec declares: generated subclasses hold the declaration, the engine classes above do the work."""

    pass_name: ClassVar[str]

    def __init__(self) -> None:
        self.report = PassReport(self.pass_name, 0)

    @property
    def name(self) -> str:
        return self.pass_name

    def apply(self, graph: ExecutionGraph) -> ExecutionGraph:
        """A transformed copy; `report` tells what was done."""
        result = graph.copy()
        self.transform(result)
        return result

    def transform(self, graph: ExecutionGraph) -> None:
        """Transforms the graph itself, for a caller that owns it; `report` tells what was done."""
        start = time.perf_counter()
        self.report = PassReport(self.pass_name, len(graph.nodes))
        if graph.stage is None or graph.stage in self.phases:
            self.run(graph)
        self.report.nodes_after = len(graph.nodes)
        self.report.seconds = time.perf_counter() - start

    @abstractmethod
    def run(self, graph: ExecutionGraph) -> None:
        """Transforms the graph in place and fills in the report."""


@dataclass(slots=True)
class RewriteOptions:
    """What rewriting is held to.

    With `kernels`, the ops that the device has a kernel for, a rule that puts in another op does not fire: the parts of
    a fused op run one by one, as they do without the rule. Rules in `disable` are left out; `only`, where given, names
    all that stay. `limit` is how many rewrites may still happen, over all passes that share the options.
    """

    kernels: Container[str] | None = None
    disable: Collection[str] = ()
    only: Collection[str] | None = None
    limit: int | None = None

    def allow(self, rule: Rule) -> bool:
        """Whether a rule takes part."""
        return rule.name not in self.disable and (self.only is None or rule.name in self.only)

    def why_not(self, rewrite: Rewrite) -> str | None:
        """Why a rewrite that a rule found is not to be done, or None."""
        if self.limit is not None and self.limit <= 0:
            return "the limit of rewrites is reached"
        lacking = [call.op.op for call in rewrite.calls if self.kernels is not None and call.op.op not in self.kernels]
        return f"the device has no kernel for {lacking[0]}" if lacking else None


class RewritePass(DeclaredPass):
    """A pass of rewrite rules.

    `expect` gives, per model name (or `*`), how often the rules fire in all, as a function of the model's config.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    expect: ClassVar[Mapping[str, Callable[[Any], int]]] = {}

    def __init__(self, options: RewriteOptions | None = None) -> None:
        super().__init__()
        self.options = options or RewriteOptions()

    def run(self, graph: ExecutionGraph) -> None:
        by_anchor: dict[type[OpNode], list[Rule]] = {}
        for rule in sorted(filter(self.options.allow, self.rules), key=lambda rule: -rule.benefit):
            by_anchor.setdefault(rule.anchor, []).append(rule)
            self.report.rules[rule.name] = RuleStats(rule.num_nodes)
        memo: Memo = {}
        for _ in range(MAX_ROUNDS):
            for stats in self.report.rules.values():
                stats.near_misses.clear()  # the last round has the final word
            position = {node_id: i for i, node_id in enumerate(graph.nodes)}
            anchors = [node for node in graph.nodes.values() if isinstance(node, OpNode) and type(node) in by_anchor]
            if not sum(self._try_rules(graph, node, by_anchor[type(node)], position, memo) for node in anchors):
                return

    def why_not_expected(self, model: str, config: Any) -> str | None:
        """How the last run differs from what the spec expects of the model, with near misses; None if it does not."""
        count = self.expect.get(model, self.expect.get("*"))
        if count is None or count(config) == self.report.fired:
            return None
        lines = [f"{self.name} fired {self.report.fired} times on {model}, expected {count(config)}"]
        for rule, stats in self.report.rules.items():
            lines += [f"  {rule} {reason}" for reason in stats.explain_near_misses()]
        return "\n".join(lines)

    def _try_rules(
        self, graph: ExecutionGraph, node: OpNode, rules: Sequence[Rule], position: Mapping[str, int], memo: Memo
    ) -> bool:
        for rule in rules:
            if graph.nodes.get(node.node_id) is not node:
                return False  # an earlier rewrite of this round took it
            stats = self.report.rules[rule.name]
            start = time.perf_counter()
            found = self._apply(rule, graph, node, position, memo)
            stats.seconds += time.perf_counter() - start
            if isinstance(found, Change):
                stats.changes.append(found)
                return True
            if found is not None:
                stats.near_misses[node.node_id] = found
        return False

    def _apply(
        self, rule: Rule, graph: ExecutionGraph, node: OpNode, position: Mapping[str, int], memo: Memo
    ) -> Change | NearMiss | None:
        found = rule.apply(graph, node)
        if not isinstance(found, Rewrite):
            return found
        if rule.bounded is not None and self.report.rules[rule.name].fired >= rule.bounded:
            return NearMiss(len(found.matched), f"it fires at most {rule.bounded} times")
        if (reason := self.options.why_not(found)) is not None:
            return NearMiss(len(found.matched), reason)
        nodes = apply_rewrite(graph, found, position, memo)
        if isinstance(nodes, NearMiss):
            return nodes
        if self.options.limit is not None:
            self.options.limit -= 1
        return Change(found.matched, tuple(nodes))
