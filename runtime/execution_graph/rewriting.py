"""Rewrite passes of a registry, selected by name and run over any graph."""

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
from sageLLM.runtime.core.passes.schedule import StreamPass
from sageLLM.runtime.registry.plugins import Registry

ALL = "all"


class Choice(TypedDict, total=False):
    """Selection of passes and rules, and limits of rewriting.

    `disable` lists passes and rules to skip, "all" for every one; `only`, if set, lists the enabled ones. `kernels`
    lists the ops with a kernel on the device: fusing into other ops would gain nothing. `limit` is the maximum number
    of rewrites. `backend` names the kernels that compute the graphs, such as "triton": a pass for others is skipped,
    unless `only` lists it.
    """

    disable: Collection[str]
    only: Collection[str] | None
    kernels: Container[str] | None
    limit: int | None
    backend: str


class Rewriting:
    """The enabled rewrite passes, in order. Raises ValueError for an unknown name."""

    def __init__(self, registry: Registry, **choice: Unpack[Choice]) -> None:
        disable, only = choice.get("disable", ()), choice.get("only")
        rules = {name: _rules(one) for name, one in registry.passes.items()}
        known = dict.fromkeys([*rules, *(rule for names in rules.values() for rule in names)])
        if unknown := sorted({*disable, *(only or ())} - known.keys() - {ALL}):
            raise ValueError(f"unknown pass or rule {', '.join(unknown)}; known are {', '.join(known)}")
        self.registry = registry
        if only is not None:
            only = {*only, *(rule for name in only for rule in rules.get(name, ()))}
        self.options = RewriteOptions(choice.get("kernels"), disable, only, choice.get("limit"))
        self.passes = [
            one
            for name, one in registry.passes.items()
            if not {name, ALL} & set(disable)
            and ({name, *rules[name]} & set(only) if only is not None else self._is_for(one, choice.get("backend")))
        ]

    @staticmethod
    def _is_for(one: type[OptimizationPass], backend: str | None) -> bool:
        return not one.kernels or backend in one.kernels

    def rewrite_passes(self, level: Level) -> list[RewritePass]:
        """New instances of the enabled rewrite passes of a level, in the order of the pipeline."""
        return [one(self.options) for one in self.passes if one.level == level and issubclass(one, RewritePass)]

    def stream_passes(self) -> list[StreamPass]:
        """New instances of the enabled passes that choose the streams of kernel graphs."""
        return [one() for one in self.passes if one.level == "kernel" and issubclass(one, StreamPass)]

    def steps(self, graph: ExecutionGraph) -> Iterator[tuple[RewritePass, ExecutionGraph]]:
        """Runs the kernel-level passes one after another; yields each pass with the graph after it.

        The graph is verified after every pass. An error has a note that names a file with the graph before the pass.
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
        """Runs the kernel-level passes over a graph in place; returns their reports."""
        passes = self.rewrite_passes("kernel")
        for one in passes:
            one.transform(graph)
        return [one.report for one in passes]


def _rules(one: type[OptimizationPass]) -> list[str]:
    return [rule.name for rule in one.rules] if issubclass(one, RewritePass) else []


def _reproducer(one: RewritePass, graph: ExecutionGraph, error: Exception) -> str:
    """Writes the graph on which a pass failed to a file; returns a message with its path and the command to replay."""
    path = Path(tempfile.gettempdir(), f"sagellm-{one.name}-{graph.graph_id}.txt")
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    replay = f"sagellm graph {path} --only {one.name}"
    path.write_text(f"# {one.name} fails on this graph: {reason}\n# {replay}\n{to_text(graph)}", encoding="utf-8")
    return f"{one.name} fails on the graph in {path}; to reproduce: {replay}"
