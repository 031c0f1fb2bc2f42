"""Measurement of node times on this machine, with the reference kernels and one small step."""

from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.inspect.numerics import inputs_of

RUNS = 20


def measured_times(graph: ExecutionGraph, kernels: Mapping[str, Kernel], runs: int = RUNS) -> dict[str, float]:
    """Microseconds by node id, the shortest of several runs; a view takes the time of its call."""
    values = inputs_of(graph)
    spent: list[float] = []
    timed = {op: _timed(kernel, spent) for op, kernel in kernels.items()}
    plan = Plan(graph, timed, {name: values[name] for name in graph.weights})
    inputs = {name: values.get(name) for name in graph.inputs}
    order = [node.node_id for node in graph.topological_sort()]
    shortest = dict.fromkeys(order, float("inf"))
    for _ in range(runs):
        spent.clear()
        plan.run(inputs)
        shortest = {node_id: min(shortest[node_id], us) for node_id, us in zip(order, spent, strict=True)}
    return shortest


def _timed(kernel: Kernel, spent: list[float]) -> Callable[..., Any]:
    def call(*operands: Any, **attrs: Any) -> Any:
        start = perf_counter_ns()
        result = kernel(*operands, **attrs)
        spent.append((perf_counter_ns() - start) / 1e3)
        return result

    return call
