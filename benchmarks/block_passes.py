"""Times the passes over block graphs of an 80-layer model, and tells what they estimate and plan for every model.

python benchmarks/block_passes.py [--runs N]

Times are the least of N runs in CPU time, as the machine may be shared. Step times are estimates of the cost model.
"""

import argparse
import time
from collections.abc import Iterable
from typing import Any

from graphs import LLAMA_70B

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.passes.place import AfDisaggregation, DropUnread, NanoBatching
from sageLLM.generated.passes.schedule import NanoOverlap
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.model.hf_config import ConfigError, HFConfig
from sageLLM.runtime.core.passes.base import DeclaredPass, OptimizationPass
from sageLLM.runtime.core.passes.lifetimes import Lifetimes
from sageLLM.runtime.core.passes.memory import plan_memory
from sageLLM.runtime.execution_graph.builder import (
    DecodeBatch,
    ExecutionGraphBuilder,
    ModelConfig,
    ParallelConfig,
    PrefillBatch,
)
from sageLLM.runtime.execution_graph.optimizer import GraphOptimizer, default_passes
from sageLLM.runtime.execution_graph.part_times import PartTimes
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.registry.plugins import load_registry

H100 = HARDWARE["h100"]
TP = 8
LARGE = ModelConfig(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_kv_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
    max_seq_len=8192,
)
PREFILL = PrefillBatch(["a"], [2048], 2048)
DECODE = DecodeBatch([str(i) for i in range(256)], [1024] * 256, 256)
STEP = {"T": 512, "Td": 12, "Tp": 500, "B": 13, "S": 13, "PG": 64, "BS": 16, "MB": 8, "P": 8192}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    for group, figures in measure(parser.parse_args().runs).items():
        print(group)
        for name, value in figures.items():
            print(f"  {name:<34} {value}")


def measure(runs: int) -> dict[str, dict[str, Any]]:
    return {
        "pass_ms_80_layers": {**pass_times(runs), **plan_times(runs)},
        "step_us_80_layers": placed_steps(),
        "step_us_by_model": model_steps(),
        "memory_by_model": model_memory(),
    }


def builder_of(model: ModelConfig, layout: str = "llama", tp: int = TP) -> ExecutionGraphBuilder:
    return ExecutionGraphBuilder(model, ParallelConfig(tp), layout=layout, hardware=H100)


def pass_times(runs: int) -> dict[str, float]:
    """Milliseconds of each pass of the default optimizer, and of all of them with the copy of the graph."""
    builder = builder_of(LARGE)
    found = {}
    graphs = {"prefill": builder.build_prefill_graph(PREFILL), "decode": builder.build_decode_graph(DECODE)}
    for stage, graph in graphs.items():
        runs_ms = [run_ms(graph) for _ in range(runs)]
        least = {name: min(one[name] for one in runs_ms) for name in runs_ms[0]}
        found |= {f"{stage}.{name}": round(value, 1) for name, value in least.items()}
    return found


def run_ms(graph: ExecutionGraph) -> dict[str, float]:
    times: dict[str, float] = {}
    begin = time.process_time()
    graph = graph.copy()
    for one in default_passes(H100, {"tp": TP}):
        start = time.process_time()
        assert isinstance(one, DeclaredPass)
        one.transform(graph)
        times[one.name] = 1e3 * (time.process_time() - start)
    return {**times, "all_and_copy": 1e3 * (time.process_time() - begin)}


def plan_times(runs: int) -> dict[str, float]:
    """Milliseconds to find the lifetimes of a kernel graph, once, and to plan its memory for the sizes of a step."""
    registry = load_registry()
    layout = registry.models["llama"]
    compiler = ModelCompiler(layout, layout.read_config(HFConfig(LLAMA_70B, "70b")), registry, dtype="bf16")
    graph = compiler.kernel_graph("decode")
    lifetimes, plan = [], []
    for _ in range(runs):
        start = time.process_time()
        found = Lifetimes(graph)
        middle = time.process_time()
        plan_memory(found, STEP)
        lifetimes.append(1e3 * (middle - start))
        plan.append(1e3 * (time.process_time() - middle))
    return {"kernel_graph.lifetimes": round(min(lifetimes), 1), "kernel_graph.plan": round(min(plan), 1)}


def placed_steps() -> dict[str, str]:
    """Estimated microseconds of a step before and after each pass, in one piece, in nano-batches, and disaggregated."""
    builder = builder_of(LARGE)
    sizes = {"tp": TP}
    found = {}
    for stage, batch in (("prefill", PREFILL), ("decode", DECODE)):
        graph = builder.build_prefill_graph(PREFILL) if stage == "prefill" else builder.build_decode_graph(DECODE)
        part = PartTimes(builder, batch)
        ways: dict[str, list[OptimizationPass]] = {
            "whole": [],
            "nano": [NanoBatching(hardware=H100, sizes=sizes, part_time=part)],
            "nano_shared": [NanoBatching(hardware=H100, sizes=sizes, part_time=part), NanoOverlap()],
            "af": [AfDisaggregation(hardware=H100, sizes=sizes, part_time=part)],
        }
        for name, passes in ways.items():
            rest = default_passes(H100, sizes) if name != "nano_shared" else []
            found[f"{stage}.{name}"] = steps(graph, [DropUnread(), *passes, *rest])
    return found


def model_steps() -> dict[str, str]:
    """The default passes over two layers' worth of every layout that these sizes are enough for, on two ranks."""
    small = ModelConfig(
        num_layers=2,
        hidden_size=4096,
        num_attention_heads=32,
        num_kv_heads=8,
        intermediate_size=14336,
        vocab_size=32000,
        max_seq_len=4096,
    )
    found = {}
    for name in load_registry().models:
        try:
            builder = builder_of(small, name, tp=2)
            graph = builder.build_prefill_graph(PrefillBatch(["a"], [512], 512))
        except (ConfigError, ValueError):
            continue
        found[name] = steps(graph, default_passes(H100, {"tp": 2}))
    return found


def steps(graph: ExecutionGraph, passes: Iterable[OptimizationPass]) -> str:
    """`85584 -> comm_fusion 85584 -> ...`; only the passes that change it."""
    text, last = f"{graph.estimate_total_time():.0f}", graph.estimate_total_time()
    for one in passes:
        graph = GraphOptimizer([one]).optimize(graph)
        now = graph.estimate_total_time()
        if abs(now - last) > 0.5:
            text += f" -> {one.name} {now:.0f}"
        last = now
    return text


def model_memory() -> dict[str, str]:
    """The arena of every model's kernel graph over the lower bound of all plans, by stage, for one mixed step."""
    registry = load_registry()
    found = {}
    for name, layout in registry.models.items():
        compiler = ModelCompiler(layout, layout.read_config(HFConfig(layout.tiny, name)), registry, dtype="bf16")
        plans = {stage: plan_memory(compiler.kernel_graph(stage), STEP) for stage in layout.phases}
        ratios = [f"{stage} {p.peak_bytes / p.max_live_bytes:.3f} x{p.reuse_ratio:.1f}" for stage, p in plans.items()]
        found[name] = ", ".join(ratios)
    return found


if __name__ == "__main__":
    main()
