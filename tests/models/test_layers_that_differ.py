"""Tests of per-layer values and conditions: config lists, computed values, branches, and their weights and graphs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sageLLM.codegen import driver
from sageLLM.generated.builders.exaone4 import EXAONE4
from sageLLM.generated.builders.gemma2 import GEMMA2
from sageLLM.generated.builders.smollm3 import SMOLLM3
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.builder import ExecutionGraphBuilder, ModelConfig, PrefillBatch, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.registry.plugins import load_registry

CASE = Path(__file__).parent.parent / "codegen" / "cases" / "good" / "model_choose"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ModelLayout:
    """The layout of the case: windows in even layers, a feed-forward without a gate in `plain_layers`."""
    out = tmp_path_factory.mktemp("mixed")
    driver.generate([CASE], out=out / "generated")
    return load_registry([out / "generated"]).models["mixed"]


def read(layout: ModelLayout, **config: Any) -> Any:
    return layout.read_config(HFConfig({**layout.tiny, **config}))


def kernels(layout: ModelLayout, stage: Any = "prefill", **config: Any) -> ExecutionGraph:
    found = read(layout, **config)
    return expand(build_block_graph(layout, found, stage, dtype="f32"), layout, found)


def ops_of(graph: ExecutionGraph, layer: int, block: str) -> list[str]:
    nodes = [node for node in graph.nodes.values() if node.layer_id == layer and node.block == block]
    return [node.op for node in nodes if isinstance(node, OpNode)]


def test_each_layer_has_the_body_of_its_variant(mixed: ModelLayout) -> None:
    graph = kernels(mixed, num_hidden_layers=4, hidden_act="gelu_tanh", plain_layers=[2])
    feed_forward = [ops_of(graph, i, "ffn") + ops_of(graph, i, "plain") for i in range(4)]
    assert feed_forward == [
        ["linear", "silu_mul", "linear"],
        ["linear", "gelu_tanh_mul", "linear"],
        ["linear", "relu", "linear"],
        ["linear", "gelu_tanh_mul", "linear"],
    ]
    attends = [node for node in graph.nodes.values() if node.op_type.name == "PREFILL_ATTN"]
    assert [node.attrs.get("window") for node in attends] == [16, None, 16, None]


def test_weights_are_in_the_layers_that_read_them(mixed: ModelLayout) -> None:
    config = read(mixed, num_hidden_layers=4, plain_layers=[0, 2])
    names = [spec.name for spec in mixed.weights(config)]
    assert [name for name in names if "wgu" in name] == ["layers.1.ffn.wgu", "layers.3.ffn.wgu"]
    assert [name for name in names if ".bu" in name] == ["layers.2.plain.bu"]
    assert [name for name in names if "extra" in name] == ["layers.0.extra_norm", "layers.2.extra_norm"]
    graph = kernels(mixed, num_hidden_layers=4, plain_layers=[0, 2])
    assert set(graph.weights) == set(names)


@pytest.mark.parametrize("stage", ["prefill", "decode", "hybrid"])
def test_copied_layers_equal_written_ones(mixed: ModelLayout, stage: Any) -> None:
    """Layers of one variant are copies of the first; where every layer is a variant, each is written."""
    settings = {"num_hidden_layers": 5, "hidden_act": "gelu_tanh", "plain_layers": [3]}
    blocks = {name: replace(block, variant=lambda c, layer: layer) for name, block in mixed.blocks.items()}
    written = kernels(replace(mixed, blocks=blocks), stage, **settings)
    copied = kernels(mixed, stage, **settings)
    assert to_text(copied) == to_text(written)


def test_a_branch_on_the_config_is_decided_for_the_whole_graph(mixed: ModelLayout) -> None:
    assert [kernels(mixed, cap=cap).nodes.get("logits_1") is not None for cap in (None, 5.0)] == [False, True]


def test_the_estimate_knows_the_layers() -> None:
    sizes = ModelConfig(4, 64, 4, 2, 96, 128, max_seq_len=256)
    builder = ExecutionGraphBuilder(sizes, layout=SMOLLM3)
    graph = builder.build_prefill_graph(PrefillBatch(["a"], [64], 64))
    times = [node.estimated_time_us for node in graph.nodes.values() if node.op_type.name == "PREFILL_ATTN"]
    assert len(times) == 4
    assert times[0] == times[1] == times[2] > times[3] > 0  # the fourth layer rotates nothing


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "length": ({"layer_types": ["full_attention"]}, "'layer_types': expected 2 items, one per layer, got 1"),
    "no list": ({"layer_types": "full_attention"}, "'layer_types': expected a list, got 'full_attention'"),
    "item": ({"layer_types": ["full_attention", 3]}, "'layer_types[1]': expected text, got 3"),
    "bool": ({"plain_layers": [True]}, "'plain_layers[0]': expected an integer, got true"),
    "value": (
        {"layer_types": ["full_attention", "chunked"]},
        "requires layer_types[i] in ['sliding_attention', 'full_attention'] for every layer i, "
        "but layer_types is ['full_attention', 'chunked']",
    ),
    "null": (
        {"sliding_window": None},
        "requires sliding_window is not null or 'sliding_attention' not in layer_types, "
        "but sliding_window is null, layer_types is ['sliding_attention', 'full_attention']",
    ),
    "layers": ({"num_hidden_layers": 2_000_000_000}, "expected at most 100000 layers, got 2000000000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_config_lists_are_refused_with_the_key(mixed: ModelLayout, case: str) -> None:
    config, message = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        read(mixed, **config)
    assert str(caught.value) == f"config.json: {message}"


def test_arithmetic_that_fails_names_its_formula(mixed: ModelLayout) -> None:
    config = read(mixed, power=1e6)
    with pytest.raises(ConfigError, match=r"^D \*\* power cannot be computed: math range error$"):
        expand(build_block_graph(mixed, config, "decode"), mixed, config)
    hf = HFConfig({}, "x.json")
    for formula, message in [
        (lambda: 1 // 0, "'K' = 1 // 0 cannot be computed: "),
        (lambda: (1, 2)[5], "'K' = 1 // 0 cannot be computed: "),
        (lambda: 1e308 * 10.0, "'K' = 1 // 0 must be finite"),
    ]:
        with pytest.raises(ConfigError) as caught:
            hf.computed("K", "1 // 0", formula)
        assert str(caught.value).startswith(f"x.json: {message}")
    with pytest.raises(ConfigError, match=r"^x.json: 'K': expected a size of 1 to 2147483647, got 0$"):
        hf.sized("K", 0)
    with pytest.raises(ConfigError, match=r"^x.json: the default of 'K': expected 3 items, one per layer, got 2$"):
        hf.one_per_layer("K", (1, 2), 3)


def test_lists_take_their_type() -> None:
    hf = HFConfig({"a": [1, 2.5], "b": [], "c": None, "n": 4}, "x.json")
    assert (hf.items("a", kind=float), hf.items("c", "b", kind=int)) == ((1.0, 2.5), ())
    assert (hf.has("c"), hf.has("c", "b")) == (False, True)
    assert (hf.items("n", kind=int, length=2), hf.items("n", kind=float, length=3)) == ((4, 4), (4.0, 4.0, 4.0))
    with pytest.raises(ConfigError, match=r"^x.json: 'n': expected a list, got 4$"):
        hf.items("n", kind=int)
    with pytest.raises(ConfigError, match=r"^x.json: 'c': expected a list, got null$"):
        hf.items("c", kind=int)


def test_a_text_stands_for_a_number() -> None:
    assert read(EXAONE4, sliding_window_pattern="LLLG") == read(EXAONE4, sliding_window_pattern=4)
    with pytest.raises(ConfigError, match=r"^config.json: 'sliding_window_pattern': expected an integer, got 'LLG'$"):
        read(EXAONE4, sliding_window_pattern="LLG")


def test_gemma2_caps_only_where_the_config_says() -> None:
    graph = kernels(GEMMA2)
    assert [node.attrs["softcap"] for node in graph.nodes.values() if node.op_type.name == "PREFILL_ATTN"] == [20.0] * 2
    without = kernels(GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert not any(isinstance(node, OpNode) and node.op == "soft_cap" for node in without.nodes.values())
    with pytest.raises(ConfigError, match=r"^config.json: requires attn_logit_softcapping > 0, but .* is -1\.0$"):
        read(GEMMA2, attn_logit_softcapping=-1.0)
