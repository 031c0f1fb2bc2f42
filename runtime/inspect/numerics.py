"""Numerical check of passes: runs a graph on random numbers in float64 after each pass, and bisects rewrites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from sageLLM.runtime.core.ir.dims import evaluate
from sageLLM.runtime.core.ir.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.core.rewrite.stats import Change
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.executor.torch_plan import Plan

SIZES = {"T": 6, "B": 2, "Td": 2, "Tp": 4, "S": 2, "PG": 5, "BS": 4, "MB": 2, "P": 8}
"""A step of two sequences: one token each in decode, else six tokens. The cache has 5 blocks of 4 slots."""

LENGTHS: Mapping[Stage, tuple[int, int]] = {"prefill": (2, 4), "decode": (1, 1), "hybrid": (1, 5)}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
TOLERANCE = 1e-9
"""Written-out rules may round in another order; rules from `fuses` are bitwise equal."""


class Verdict(NamedTuple):
    """The effect of a pass on the results: the largest relative difference, and the value where it is too large."""

    pass_name: str
    difference: float
    wrong: str | None


def verify_numerics(graphs: ModelGraphs, stage: Stage) -> Iterator[Verdict]:
    """A verdict for each kernel-level pass. The graphs must be built with element type f64."""
    graph = graphs.expanded_graph(stage)
    expected = run_once(graph, graphs.registry.kernels)
    for one, after in graphs.steps(graph):
        found = run_once(after, graphs.registry.kernels)
        yield Verdict(one.name, *_compare(expected, found))
        expected = found


def find_bad_rewrite(graphs: ModelGraphs, stage: Stage) -> tuple[int, str, Change] | None:
    """The first rewrite that changes a result: its number over all passes, its rule, and the nodes it replaced.

    None if all rewrites together change nothing. Bisection runs the passes up to a limit of rewrites in each step.
    """
    graph = graphs.expanded_graph(stage)
    expected = run_once(graph, graphs.registry.kernels)

    def rewritten(limit: int | None) -> tuple[dict[str, list[Change]], bool]:
        graphs.options.limit = limit
        copy = graph.copy()
        reports = graphs.rewrite(copy)
        changes = {name: stats.changes for report in reports for name, stats in report.rules.items()}
        return changes, _compare(expected, run_once(copy, graphs.registry.kernels))[1] is None

    changes, is_right = rewritten(graphs.options.limit)
    if is_right:
        return None
    # Rewrites run in a fixed order; bisection assumes that a wrong result stays wrong with further rewrites.
    good, bad = 0, sum(map(len, changes.values()))
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if rewritten(middle)[1] else (good, middle)
    before, after = rewritten(good)[0], rewritten(bad)[0]
    name = next(name for name, found in after.items() if len(found) > len(before[name]))
    return bad, name, after[name][-1]


def run_once(graph: ExecutionGraph, kernels: Mapping[str, Kernel]) -> dict[str, torch.Tensor]:
    """The outputs and the caches after one small step on random weights, by name."""
    values = inputs_of(graph)
    bound = {name: values[name] for name in graph.weights}
    outputs = Plan(graph, kernels, bound).run({name: values.get(name) for name in graph.inputs})
    caches = {name: values[name] for name in graph.inputs if name.endswith("_cache")}
    return dict(zip([ref.name for ref in graph.outputs], outputs, strict=True)) | caches


def inputs_of(graph: ExecutionGraph) -> dict[str, torch.Tensor]:
    """A value for every weight and input of a small step, except inputs of sampling, which default to greedy."""
    return _random_values(graph) | _step(graph.stage or "prefill")


def _random_values(graph: ExecutionGraph) -> dict[str, torch.Tensor]:
    """Random values in alphabetical order of the names, so that all graphs of a model receive the same."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: ref for name, ref in graph.inputs.items() if not _is_of_sampling(ref, graph)}
    return {name: _random(ref, generator) for name, ref in sorted({**graph.weights, **inputs}.items())}


def _random(ref: TensorRef, generator: torch.Generator) -> torch.Tensor:
    shape = [int(str(evaluate(size, SIZES))) for size in ref.shape]
    return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).to(DTYPES.get(ref.dtype, torch.float64))


def _is_of_sampling(ref: TensorRef, graph: ExecutionGraph) -> bool:
    """Whether an input is read only by nodes that sample tokens, plain or fused."""
    users = graph.users(ref)
    return bool(users) and all(user.op_type.name == "SAMPLE" for user in users)


def _step(stage: Stage) -> dict[str, torch.Tensor]:
    """The inputs that must be valid indices: ids, positions, slots, and the tables of a step of two sequences."""
    lengths = LENGTHS[stage]
    starts = [0, lengths[0], sum(lengths)]
    positions = [p for length in lengths for p in range(length)]
    slots = [*range(lengths[0]), *range(8, 8 + lengths[1])]
    table = {"ids": positions, "pos": positions, "slots": slots, "q_start": starts, "seq_lens": list(lengths)}
    table |= {"rows": [starts[1] - 1, starts[2] - 1], "type_ids": [p % 2 for p in positions]}
    step = {name: torch.tensor(column, dtype=torch.int32) for name, column in table.items()}
    return step | {"block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)}


def _compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> tuple[float, str | None]:
    largest = 0.0
    for name, value in expected.items():
        if value.shape != found[name].shape:
            return float("inf"), f"{name} has another shape"
        difference = _difference(value.double(), found[name].double())
        if not difference <= TOLERANCE:
            return difference, f"{name} differs by {difference:.3g}"
        largest = max(largest, difference)
    return largest, None


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; NaNs in the same position are equal."""
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros_like(a), (a - b).abs()).max()
    return float(gap / a[a.isfinite()].abs().max().clamp(min=1e-300)) if float(gap) else float(gap)
