"""Times building and optimising the graphs of an 80-layer model (Llama-3-70B's shape), and counts what is left.

python benchmarks/graphs.py [--runs N]
"""

import argparse
import statistics
import time
from typing import Any

from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.registry.plugins import load_registry

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    for name, value in measure(parser.parse_args().runs).items():
        print(f"{name:<40} {value}")


def measure(runs: int) -> dict[str, Any]:
    """Medians in milliseconds for one stage's graph, from the layout to the optimised kernel graph."""
    registry = load_registry()
    layout = registry.models["llama"]
    config = layout.read_config(HFConfig(LLAMA_70B, "llama-3-70b"))
    build, optimise, num_nodes, num_kernels = [], [], 0, 0
    for _ in range(runs + 1):  # the first run imports and warms up
        compiler = ModelCompiler(layout, config, registry, dtype="bf16")
        start = time.perf_counter()
        graph = compiler.expanded_graph("decode")
        middle = time.perf_counter()
        optimised = compiler.kernel_graph("decode")
        end = time.perf_counter()
        build.append(1e3 * (middle - start))
        optimise.append(1e3 * (end - start))
        num_nodes, num_kernels = len(graph.nodes), len(optimised.nodes)
    return {
        "build_80_layers_ms": round(statistics.median(build[1:]), 1),
        "build_and_optimise_80_layers_ms": round(statistics.median(optimise[1:]), 1),
        "nodes_before_passes": num_nodes,
        "nodes_after_passes": num_kernels,
    }


if __name__ == "__main__":
    main()
