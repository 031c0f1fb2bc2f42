"""Counts what the rewrite passes do to every model's decode graph, and times them on an 80-layer one.

python benchmarks/passes.py [--runs N] [--rules]
"""

import argparse
import statistics
from collections import defaultdict
from typing import Any

from graphs import LLAMA_70B

from sageLLM.runtime.core.config import HFConfig
from sageLLM.runtime.engine.plugins import load_registry
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs, paused_gc
from sageLLM.runtime.execution_graph.rule_table import rule_table, work
from sageLLM.runtime.execution_graph.summary import step_of


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
    for name, value in figures["80_layers"].items():
        print(f"{name:<40} {value}")


def measure(runs: int) -> dict[str, Any]:
    """Nodes, kernels and bytes of a step of each model before and after its passes; milliseconds on 80 layers."""
    return {"models": {name: _of_model(name) for name in load_registry().models}, "80_layers": _times(runs)}


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


def print_rules() -> None:
    """What every rule did in the decode graph of every model."""
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
