"""Tests that every pass fires as often as its spec expects, in every model and stage, and preserves the results."""

import pytest
import torch

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import SpecErrors
from sageLLM.codegen.expectations import check_expectations
from sageLLM.runtime.core.ir.graph import Stage
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.rewrite.rules import NearMiss, Rewrite
from sageLLM.runtime.execution_graph.model_graphs import ModelGraphs
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.inspect.expectations import UnbuiltModel, missed_expectations, missed_in
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


def test_a_graph_that_cannot_be_built_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelGraphs, stage: Stage) -> None:
        assert stage == "prefill", "only the first stage that fails is reported"
        raise ZeroDivisionError("integer modulo by zero")

    monkeypatch.setattr(ModelGraphs, "expanded_graph", fail)
    error = "ZeroDivisionError: integer modulo by zero"
    assert missed_in(REGISTRY, {}, ["llama"]) == [UnbuiltModel("llama", "prefill", error)]
    specs = driver.load_and_link()
    with pytest.raises(SpecErrors) as caught:
        check_expectations(specs.raw, [], lambda tree, is_overlay: missed_in(REGISTRY, {}, ["llama"]))
    (found,) = caught.value.diagnostics
    assert found.code == "SAGE254"
    assert found.message == f"the prefill graph of 'llama' cannot be built from tests.tiny: {error}"


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
