"""Tests of rewrite passes on random kernel graphs: the reference computes the same bits before and after."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import torch

from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.generated.ops import OPS
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.execution_graph.rewriting import Rewriting
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.inspect.numerics import inputs_of
from sageLLM.runtime.registry.plugins import load_registry

ROWS, WIDTH = 3, 8
TWO = ("add", "mul")
NORMS = ("rms_norm", "rms_norm_1p", "rms_norm_wide", "layer_norm")
ONE = ("gelu", "gelu_tanh", "silu")
GATES = ("silu_mul", "gelu_mul", "gelu_tanh_mul")
REGISTRY = load_registry()


class RandomGraph:
    """Writes nodes with random operands; values are rows of WIDTH features, or twice that for gates."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.g = GraphWriter("random", level="kernel", stage=None, dtype="f64")
        self.values = [self.g.input(name, "f64", ROWS, WIDTH) for name in ("x", "y")]
        self.wide: list[TensorRef] = []
        self.weights = 0

    def weight(self, *shape: int) -> TensorRef:
        self.weights += 1
        return self.g.weight(f"w{self.weights}", "f64", *shape)

    def any(self, values: list[TensorRef]) -> TensorRef:
        """A value, most often the last one, so that chains grow."""
        return values[-min(self.random.choice([1, 1, 1, 2, 3, 5]), len(values))]

    def emit(self, op: str, inputs: Mapping[str, TensorRef | None]) -> TensorRef:
        return self.g.emit(OPS[op], {n: ref for n, ref in inputs.items() if ref is not None}, {}, (f"v_{op}",))[0]

    def step(self) -> None:
        op = self.random.choice([*TWO, "add", *NORMS, *ONE, "linear", "linear", "widen", *(GATES if self.wide else ())])
        is_there = self.random.random() < 0.5
        if op in TWO:
            self.values.append(self.emit(op, {"x": self.any(self.values), "y": self.any(self.values)}))
        elif op in NORMS:
            has_weight = is_there or op in ("rms_norm_1p", "rms_norm_wide")
            weight = self.weight(WIDTH) if has_weight else None
            self.values.append(self.emit(op, {"x": self.any(self.values), "w": weight}))
        elif op in ONE:
            self.values.append(self.emit(op, {"x": self.any(self.values)}))
        elif op in GATES:
            self.values.append(self.emit(op, {"gu": self.any(self.wide)}))
        else:
            width = 2 * WIDTH if op == "widen" else WIDTH
            bias = self.weight(width) if is_there else None
            inputs = {"x": self.any(self.values), "w": self.weight(width, WIDTH), "bias": bias}
            (self.wide if op == "widen" else self.values).append(self.emit("linear", inputs))


def random_graph(seed: int) -> ExecutionGraph:
    random = Random(seed)
    made = RandomGraph(random)
    for _ in range(random.randint(2, 16)):
        made.step()
    returned = random.choices([*made.values, *made.wide], k=random.randint(0, 2))
    return made.g.finish(list(dict.fromkeys([*returned, made.values[-1]])))


def run(graph: ExecutionGraph) -> list[torch.Tensor]:
    values = inputs_of(graph)
    plan = Plan(graph, KERNELS, {name: values[name] for name in graph.weights})
    return plan.run({name: values[name] for name in graph.inputs})


def test_no_pass_changes_a_bit() -> None:
    """Most of the rules for such ops fire in one graph or another."""
    fired: set[str] = set()

    for seed in range(150):
        graph = random_graph(seed)
        wanted = run(graph)
        for one, after in Rewriting(REGISTRY).steps(graph):
            changes = [change for stats in one.report.rules.values() for change in stats.changes]
            assert len(after.nodes) == len(graph.nodes) - sum(len(change.old) - 1 for change in changes)
            for a, b in zip(wanted, run(after) if changes else wanted, strict=True):
                assert torch.equal(a, b), f"{one.name} changes the graph of seed {seed}"
            fired.update(name for name, stats in one.report.rules.items() if stats.fired)
            graph = after
    assert fired >= {"fused_add_rms_norm", "fused_add_layer_norm", "linear_add", "linear_gelu", "linear_silu_mul"}
