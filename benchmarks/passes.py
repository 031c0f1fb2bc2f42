"""Counts what the rewrite passes do to every model's decode graph, times them on an 80-layer one, and times a step.

python benchmarks/passes.py [--runs N] [--rules]
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from graphs import LLAMA_70B

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.cost import annotate
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs, paused_gc
from sageLLM.runtime.executor.kernel_choice import choose_planner
from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.inspect.numerics import SIZES, inputs_of
from sageLLM.runtime.inspect.rule_table import rule_table, work
from sageLLM.runtime.inspect.summary import step_of
from sageLLM.runtime.registry.plugins import Registry, load_registry

QWEN3_IN_CACHE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}
"""So small that reading weights does not hide everything else."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--rules", action="store_true", help="print the table of rules of every model as well")
    arguments = parser.parse_args()
    if arguments.rules:
        print_rules()
    figures = measure(arguments.runs)
    for model, row in figures["models"].items():
        print(f"{model:<14}" + "  ".join(f"{name} {before:>5} -> {after:<5}" for name, (before, after) in row.items()))
    for name, value in (figures["80_layers"] | figures["step_after_each_pass"]).items():
        print(f"{name:<40} {value}")


def measure(runs: int) -> dict[str, Any]:
    """Nodes, kernels and bytes of a step of each model before and after its passes; milliseconds on 80 layers."""
    return {
        "models": {name: _of_model(name) for name in load_registry().models},
        "80_layers": _times(runs),
        "step_after_each_pass": _steps(runs),
    }


def _of_model(name: str) -> dict[str, tuple[int, int]]:
    """On the model's small config, in its first phase for encoders and in decode for the others."""
    graphs = _small(name)
    stage = "decode" if "decode" in graphs.layout.phases else graphs.layout.phases[0]
    step = step_of(stage, graphs.config)
    both = [work(g.nodes.values(), step) for g in (graphs.expanded_graph(stage), graphs.kernel_graph(stage))]
    return {what: (both[0][i], both[1][i]) for i, what in ((0, "nodes"), (1, "kernels"), (3, "bytes"))}


def _small(name: str) -> ModelGraphs:
    registry = load_registry()
    layout = registry.models[name]
    config = layout.read_config(HFConfig(layout.tiny, f"{name}: tests.tiny"))
    return ModelGraphs(layout, config, registry, dtype="f32")


def _times(runs: int) -> dict[str, Any]:
    registry = load_registry()
    layout = registry.models["llama"]
    graphs = ModelGraphs(layout, layout.read_config(HFConfig(LLAMA_70B, "llama-3-70b")), registry, dtype="bf16")
    spent: dict[str, list[float]] = defaultdict(list)
    before = after = 0
    for _ in range(runs + 1):  # the first run warms up
        graph = graphs.expanded_graph("decode")
        before = len(graph.nodes)
        with paused_gc():
            reports = graphs.rewrite(graph)
        after = len(graph.nodes)
        for report in reports:
            spent[report.name].append(1e3 * report.seconds)
    each = {f"{name}_ms": round(statistics.median(times[1:]), 1) for name, times in spent.items()}
    total = statistics.median([sum(times) for times in zip(*spent.values(), strict=True)][1:])
    return each | {"all_passes_ms": round(total, 1), "nodes_before": before, "nodes_after": after}


def _steps(runs: int) -> dict[str, dict[str, float]]:
    """Microseconds of a decode step of two sequences after each pass: estimated, and measured on the CPU's kernels.

    The graphs take turns, and of each the shortest of its runs counts.
    """
    registry = load_registry()
    layout = registry.models["qwen3"]
    graphs = ModelGraphs(layout, layout.read_config(HFConfig(QWEN3_IN_CACHE, "qwen3, small")), registry, dtype="f32")
    start = graphs.expanded_graph("decode")
    states = {"expanded": start} | {one.name: after for one, after in graphs.steps(start)}
    steps = {name: _native_step(graph, registry) for name, graph in states.items()}
    shortest = dict.fromkeys(states, float("inf"))
    for _ in range(20 * runs):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            shortest[name] = min(shortest[name], 1e6 * (time.perf_counter() - begin))
    for graph in states.values():
        annotate(graph, HARDWARE["cpu"], {**step_of("decode", graphs.config), **SIZES})
    return {
        name: {"kernels": work(graph.nodes.values(), step_of("decode", graphs.config))[1],
               "estimated_us": round(graph.estimate_total_time()), "measured_us": round(shortest[name])}
        for name, graph in states.items()
    }  # fmt: skip


def _native_step(graph: ExecutionGraph, registry: Registry) -> Callable[[], object]:
    values = inputs_of(graph)
    planner = choose_planner("auto", registry, torch.device("cpu"), "f32")
    weights: dict[str, Weight] = {name: values[name] for name in graph.weights}
    planner.prepare_weights(weights, {}, [graph])
    plan = planner.plan(graph, weights)
    return partial(plan.run, {name: values.get(name) for name in graph.inputs})


def print_rules() -> None:
    """The rewrites of every rule in the decode graph of every model."""
    for name in load_registry().models:
        graphs = _small(name)
        stage = "decode" if "decode" in graphs.layout.phases else graphs.layout.phases[0]
        graphs.kernel_graph(stage)
        print(
            f"== {name}, {stage}",
            rule_table(graphs.reports[stage], step_of(stage, graphs.config)),
            sep="\n",
            end="\n\n",
        )


if __name__ == "__main__":
    main()
