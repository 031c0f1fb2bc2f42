"""Tests that every pass fires as often as its spec expects, in every model and stage, and preserves the results."""

import pytest
import torch

from sageLLM.codegen import driver
from sageLLM.runtime.core.ir.graph import Stage
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.rewrite.rules import NearMiss, Rewrite
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.inspect.expectations import missed_expectations
from sageLLM.runtime.inspect.numerics import run_once
from sageLLM.runtime.registry.plugins import load_registry

REGISTRY = load_registry()
CASES = [(name, stage) for name, layout in REGISTRY.models.items() for stage in layout.phases]


def compiler_of(model: str) -> ModelCompiler:
    layout = REGISTRY.models[model]
    config = layout.read_config(HFConfig(layout.tiny, f"{model}: tests.tiny"))
    return ModelCompiler(layout, config, REGISTRY, dtype="f64")


def test_passes_fire_as_often_as_expected() -> None:
    assert missed_expectations(driver.BASE_OUT) == []


@pytest.mark.parametrize(("model", "stage"), CASES)
def test_optimised_graphs_are_valid_and_mean_the_same_bit_for_bit(model: str, stage: Stage) -> None:
    compiler = compiler_of(model)
    before, after = compiler.expanded_graph(stage), compiler.kernel_graph(stage)
    verify(after)
    fired = sum(report.fired for report in compiler.reports[stage])
    assert (len(after.nodes) < len(before.nodes)) == (fired > 0)
    results = [run_once(graph, compiler.kernels) for graph in (before, after)]
    for name, wanted in results[0].items():
        assert torch.equal(wanted, results[1][name]), name
        assert wanted.isfinite().all(), name


def test_a_value_that_others_read_is_not_fused_away() -> None:
    """If the sum before a norm were not kept, its other reader would lose it: the rule keeps it as an output."""
    graph = compiler_of("llama").kernel_graph("decode")
    fused = [node for node in graph.nodes.values() if node.op == "fused_add_rms_norm"]
    sums = [node.outputs[1] for node in fused]
    assert all(graph.users(ref) for ref in sums)


def test_near_misses_name_the_obstacle() -> None:
    compiler = compiler_of("llama")
    graph = compiler.expanded_graph("decode")
    norm = next(node for node in graph.nodes.values() if node.op == "rms_norm")
    rules = next(one for one in compiler.rewrite_passes("kernel") if one.name == "fuse_norm").rules
    rule = next(rule for rule in rules if rule.name == "fused_add_rms_norm")
    assert isinstance(norm, OpNode)
    found = rule.apply(graph, norm)
    assert not isinstance(found, Rewrite)
    assert found == NearMiss(1, "rms_norm.x comes from embedding, expected add")
