"""The rewrite passes of a registry, chosen by name, run one after another over any graph."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Container, Iterator
from pathlib import Path
from typing import TypedDict, Unpack

from sageLLM.runtime.core.ir.graph import ExecutionGraph, Level
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.base import OptimizationPass, PassReport
from sageLLM.runtime.core.passes.rewrite import RewriteOptions, RewritePass
from sageLLM.runtime.registry.plugins import Registry

ALL = "all"


class Choice(TypedDict, total=False):
    """Which passes and rules take part, and how far they go.

    `disable` names passes and rules that are left out, "all" every one; `only`, where given, names all that stay.
    `kernels` names the ops that the device has a kernel for, where fusing others would gain nothing, and `limit` is the
    number of rewrites after which no more happen.
    """

    disable: Collection[str]
    only: Collection[str] | None
    kernels: Container[str] | None
    limit: int | None


class Rewriting:
    """The enabled rewrite passes, in order. ValueError for a name that is not known."""

    def __init__(self, registry: Registry, **choice: Unpack[Choice]) -> None:
        disable, only = choice.get("disable", ()), choice.get("only")
        rules = {name: _rules(one) for name, one in registry.passes.items()}
        known = dict.fromkeys([*rules, *(rule for names in rules.values() for rule in names)])
        if unknown := sorted({*disable, *(only or ())} - known.keys() - {ALL}):
            raise ValueError(f"no pass or rule named {', '.join(unknown)}; known are {', '.join(known)}")
        self.registry = registry
        if only is not None:
            only = {*only, *(rule for name in only for rule in rules.get(name, ()))}
        self.options = RewriteOptions(choice.get("kernels"), disable, only, choice.get("limit"))
        self.passes = [
            one
            for name, one in registry.passes.items()
            if not {name, ALL} & set(disable) and (only is None or {name, *rules[name]} & set(only))
        ]

    def rewrite_passes(self, level: Level) -> list[RewritePass]:
        """New instances of the enabled rewrite passes of a level, in the order of the pipeline."""
        return [one(self.options) for one in self.passes if one.level == level and issubclass(one, RewritePass)]

    def steps(self, graph: ExecutionGraph) -> Iterator[tuple[RewritePass, ExecutionGraph]]:
        """Runs the kernel-level passes one after another; gives each pass with the graph that it left.

        The graph is verified after every pass. An error carries a note that names a file with the graph before it.
        """
        for one in self.rewrite_passes("kernel"):
            try:
                after = one.apply(graph)
                verify(after)
            except Exception as error:
                error.add_note(_reproducer(one, graph, error))
                raise
            graph = after
            yield one, graph

    def rewrite(self, graph: ExecutionGraph) -> list[PassReport]:
        """Runs the kernel-level passes over a graph of the caller's, in place."""
        passes = self.rewrite_passes("kernel")
        for one in passes:
            one.transform(graph)
        return [one.report for one in passes]


def _rules(one: type[OptimizationPass]) -> list[str]:
    return [rule.name for rule in one.rules] if issubclass(one, RewritePass) else []


def _reproducer(one: RewritePass, graph: ExecutionGraph, error: Exception) -> str:
    """Writes the graph on which a pass failed, and says where it is and how to run the pass on it again."""
    path = Path(tempfile.gettempdir(), f"sagellm-{one.name}-{graph.graph_id}.txt")
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    replay = f"sagellm graph {path} --only {one.name}"
    path.write_text(f"# {one.name} fails on this graph: {reason}\n# {replay}\n{to_text(graph)}", encoding="utf-8")
    return f"{one.name} fails on the graph in {path}; to see it again: {replay}"
