"""Measurement of a kernel graph on this machine: when each node of one small step runs, on its stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch

from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.order import Span, end_of
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.execution_graph.batch import DecodeBatch, PrefillBatch, step_sizes
from sageLLM.runtime.executor.kernel_choice import make_runner
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.inspect.numerics import LENGTHS, SIZES, inputs_of
from sageLLM.runtime.kernels.cpu.compiler import CompileError
from sageLLM.runtime.registry.plugins import Registry

RUNS = 20
Spans = Mapping[str, Span]


class Measurement(NamedTuple):
    """The kernels that ran, and the run of each node, in microseconds from the start of the step."""

    kernels: str
    spans: Spans


class Interval(NamedTuple):
    """One call of a node, in nanoseconds on some clock."""

    node_id: str
    begin_ns: int
    end_ns: int


def measure(graph: ExecutionGraph, registry: Registry, runs: int = RUNS) -> Measurement:
    """The shortest of several runs, by the native kernels, or by the references without a compiler."""
    values = inputs_of(graph)
    bound = {name: values[name] for name in graph.weights}
    inputs = {name: values.get(name) for name in graph.inputs}
    run: Callable[[], Sequence[Interval]]
    with torch.inference_mode():
        try:
            plan = NativePlan(graph, make_runner(registry), registry.kernels, bound)
            name, run = "native kernels", partial(_native_intervals, plan, inputs)
        except CompileError:
            name, run = "reference kernels", _reference_run(graph, registry.kernels, bound, inputs)
        measured = [spans_of(graph, run()) for _ in range(runs)]
    return Measurement(name, min(measured, key=end_of))


def measured_sizes(graph: ExecutionGraph) -> dict[str, Dim]:
    """The sizes of the step that `measure` runs, to plan the same step; see `specs/dims.yaml`."""
    lengths = list(LENGTHS[graph.stage or "prefill"])
    num_decodes = {"prefill": 0, "decode": 2}.get(graph.stage or "prefill", 1)
    contexts, prompts = lengths[:num_decodes], lengths[num_decodes:]
    prefill = PrefillBatch(["p"] * len(prompts), prompts, sum(prompts)) if prompts else None
    decode = DecodeBatch(["d"] * num_decodes, contexts, num_decodes) if contexts else None
    sizes: dict[str, Dim] = {**step_sizes(prefill, decode)}
    config = graph.model_config
    experts, per_token = getattr(config, "X", 0), getattr(config, "A", 0)
    pool = {name: SIZES[name] for name in ("PG", "BS", "MB", "P")}
    return {**sizes, **pool, "EX": min(experts, per_token * sum(lengths))}


def spans_of(graph: ExecutionGraph, intervals: Iterable[Interval]) -> dict[str, Span]:
    """The span of every node; one without a call, such as a view, ends when the last of its dependencies does."""
    calls: dict[str, list[Interval]] = {}
    for one in intervals:
        calls.setdefault(one.node_id, []).append(one)
    start_ns = min((one.begin_ns for found in calls.values() for one in found), default=0)
    spans: dict[str, Span] = {}
    for node in graph.topological_sort():
        own = calls.get(node.node_id)
        if own is None:
            ready = max((spans[name].end_us for name in node.dependencies), default=0.0)
            spans[node.node_id] = Span(ready, ready)
        else:
            begin, end = min(one.begin_ns for one in own), max(one.end_ns for one in own)
            spans[node.node_id] = Span((begin - start_ns) / 1e3, (end - start_ns) / 1e3)
    return spans


def _native_intervals(plan: NativePlan, inputs: Mapping[str, torch.Tensor | None]) -> list[Interval]:
    return [Interval(one.node_id, one.begin_ns, one.end_ns) for one in plan.time_calls(inputs)]


def _reference_run(
    graph: ExecutionGraph,
    kernels: Mapping[str, Kernel],
    bound: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor | None],
) -> Callable[[], Sequence[Interval]]:
    spent: list[tuple[int, int]] = []
    plan = Plan(graph, {op: _timed(kernel, spent) for op, kernel in kernels.items()}, bound)
    order = [node.node_id for node in graph.topological_sort()]

    def run() -> list[Interval]:
        spent.clear()
        plan.run(inputs)
        return [Interval(node_id, *times) for node_id, times in zip(order, spent, strict=True)]

    return run


def _timed(kernel: Kernel, spent: list[tuple[int, int]]) -> Callable[..., Any]:
    def call(*operands: Any, **attrs: Any) -> Any:
        start = perf_counter_ns()
        result = kernel(*operands, **attrs)
        spent.append((start, perf_counter_ns()))
        return result

    return call
