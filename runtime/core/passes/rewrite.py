"""Rewrite passes: the driver applies rewrite rules until none fires, and counts every attempt."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.passes.base import DeclaredPass
from sageLLM.runtime.core.rewrite.replacement import apply_rewrite
from sageLLM.runtime.core.rewrite.rules import NearMiss, Rewrite, Rule
from sageLLM.runtime.core.rewrite.stats import Change, RuleStats

MAX_ROUNDS = 8
"""Rounds over the graph. The generator checks that rules shrink it, so a fixpoint is reached much earlier."""


@dataclass(slots=True)
class RewriteOptions:
    """Restrictions on rewriting.

    `kernels` are the ops with a kernel on the device: a rule that inserts another op does not fire, since a fused op
    without a kernel would run as its parts anyway. Rules in `disable` are skipped; `only`, if set, lists the enabled
    ones. `limit` is the number of rewrites left, over all passes that share the options; bisection lowers it.
    """

    kernels: Container[str] | None = None
    disable: Collection[str] = ()
    only: Collection[str] | None = None
    limit: int | None = None

    def allow(self, rule: Rule) -> bool:
        """Whether a rule is enabled."""
        return rule.name not in self.disable and (self.only is None or rule.name in self.only)

    def why_not(self, rewrite: Rewrite) -> str | None:
        """The restriction that forbids a rewrite, or None."""
        if self.limit is not None and self.limit <= 0:
            return "the limit of rewrites is reached"
        missing = [call.op.op for call in rewrite.calls if self.kernels is not None and call.op.op not in self.kernels]
        return f"the device lacks a kernel for {missing[0]}" if missing else None


class RewritePass(DeclaredPass):
    """A pass of rewrite rules.

    `expect` maps a model name (or `*`) to the expected number of rewrites, as a function of the model's config.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    expect: ClassVar[Mapping[str, Callable[[Any], int]]] = {}

    def __init__(self, options: RewriteOptions | None = None) -> None:
        super().__init__()
        self.options = options or RewriteOptions()

    def run(self, graph: ExecutionGraph) -> None:
        by_anchor: dict[type[OpNode], list[Rule]] = {}
        # The sort is stable: rules of equal benefit keep the order of the spec.
        for rule in sorted(filter(self.options.allow, self.rules), key=lambda rule: -rule.benefit):
            by_anchor.setdefault(rule.anchor, []).append(rule)
            self.report.rules[rule.name] = RuleStats(rule.num_nodes)
        memo: Memo = {}
        for _ in range(MAX_ROUNDS):
            for stats in self.report.rules.values():
                stats.near_misses.clear()  # only the last round, which fires nothing, explains the final graph
            # Computed once per round: rewrites keep the relative order of the other nodes.
            position = {node_id: i for i, node_id in enumerate(graph.nodes)}
            anchors = [node for node in graph.nodes.values() if isinstance(node, OpNode) and type(node) in by_anchor]
            if not sum(self._try_rules(graph, node, by_anchor[type(node)], position, memo) for node in anchors):
                return

    def why_not_expected(self, model: str, config: Any) -> str | None:
        """The difference between the last run and the spec's expectation for the model, with near misses, or None."""
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
                return False  # an earlier rewrite of this round replaced it
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
