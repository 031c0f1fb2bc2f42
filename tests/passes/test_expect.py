"""Every pass fires as often as its spec expects, in every model and stage, and never changes what a graph means."""

import pytest
import torch

from sageLLM.codegen import driver
from sageLLM.runtime.core.config import HFConfig
from sageLLM.runtime.core.dims import evaluate
from sageLLM.runtime.core.graph import ExecutionGraph, Stage
from sageLLM.runtime.core.ir import OpNode
from sageLLM.runtime.core.rewrite import NearMiss, Rewrite
from sageLLM.runtime.engine.plugins import load_registry
from sageLLM.runtime.execution_graph.executor import Plan
from sageLLM.runtime.execution_graph.expectations import missed_expectations
from sageLLM.runtime.execution_graph.pipeline import Pipeline

REGISTRY = load_registry()
STEP = {"T": 6, "B": 2, "Td": 2, "Tp": 4, "S": 2, "PG": 5, "BS": 4, "MB": 2, "P": 8}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "noise")
CASES = [(name, stage) for name, layout in REGISTRY.models.items() for stage in layout.phases]


def pipeline_of(model: str) -> Pipeline:
    layout = REGISTRY.models[model]
    config = layout.read_config(HFConfig(layout.tiny, f"{model}: tests.tiny"))
    return Pipeline(layout, config, REGISTRY, dtype="f64")


def test_passes_fire_as_often_as_expected() -> None:
    assert missed_expectations(driver.BASE_OUT) == []


@pytest.mark.parametrize(("model", "stage"), CASES)
def test_optimised_graphs_are_valid_and_mean_the_same_bit_for_bit(model: str, stage: Stage) -> None:
    pipeline = pipeline_of(model)
    before, after = pipeline.expanded_graph(stage), pipeline.kernel_graph(stage)
    after.verify()
    fired = sum(report.fired for report in pipeline.reports[stage])
    assert (len(after.nodes) < len(before.nodes)) == (fired > 0)
    results = [run(graph, pipeline) for graph in (before, after)]
    assert torch.equal(results[0], results[1])
    assert results[0].isfinite().all()


def run(graph: ExecutionGraph, pipeline: Pipeline) -> torch.Tensor:
    """The logits of one small step on random weights in float64, the same for every graph of a model."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, torch.Tensor] = {}
    for name, ref in sorted({**graph.weights, **graph.inputs}.items()):
        if name not in SAMPLING:
            shape = [int(str(evaluate(dim, STEP))) for dim in ref.shape]
            values[name] = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    values |= step_of(graph.stage or "prefill")
    bound = {name: values[name] for name in graph.weights}
    return Plan(graph, pipeline.kernels, bound).run({name: values.get(name) for name in graph.inputs})[0]


def step_of(stage: Stage) -> dict[str, torch.Tensor]:
    """Two sequences: one token each in decode, else one token and the rest."""
    lengths = {"prefill": [2, 4], "decode": [1, 1], "hybrid": [1, 5]}[stage]
    starts = [0, lengths[0], sum(lengths)]
    positions = [p for length in lengths for p in range(length)]
    slots = [*range(lengths[0]), *range(8, 8 + lengths[1])]
    table = {"ids": positions, "pos": positions, "slots": slots, "q_start": starts, "seq_lens": lengths}
    table |= {"rows": [starts[1] - 1, starts[2] - 1], "type_ids": [p % 2 for p in positions]}
    step = {name: torch.tensor(column, dtype=torch.int32) for name, column in table.items()}
    step["block_table"] = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return step


def test_a_value_that_others_read_is_not_fused_away() -> None:
    """If the sum before a norm were not kept, its other reader would lose it: the rule keeps it as an output."""
    graph = pipeline_of("llama").kernel_graph("decode")
    fused = [node for node in graph.nodes.values() if node.op == "fused_add_rms_norm"]
    sums = [node.outputs[1] for node in fused]
    assert all(graph.users(ref) for ref in sums)


def test_near_misses_say_what_stands_in_the_way() -> None:
    pipeline = pipeline_of("llama")
    graph = pipeline.expanded_graph("decode")
    norm = next(node for node in graph.nodes.values() if node.op == "rms_norm")
    rules = next(one for one in pipeline.rewrite_passes("kernel") if one.name == "fuse_norm").rules
    rule = next(rule for rule in rules if rule.name == "fused_add_rms_norm")
    assert isinstance(norm, OpNode)
    found = rule.apply(graph, norm)
    assert not isinstance(found, Rewrite)
    assert found == NearMiss(1, "rms_norm.x comes from embedding, want add")
