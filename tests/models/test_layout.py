"""Tests of layouts: reading and rejecting configs, mapping of weights to checkpoints, and graphs of tiny models."""

import json
import time
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from safetensors import safe_open
from syrupy.assertion import SnapshotAssertion

from sageLLM.codegen import driver
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.layout_text import layout_text
from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.checkpoint import check_checkpoint
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout, Stage
from sageLLM.runtime.core.model.weights import padded_vocab, share_runs, share_shape, vocab_share
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand
from sageLLM.runtime.loader.weights import rank_shard

LLAMA, QWEN3 = MODELS["llama"], MODELS["qwen3"]
STAGES: tuple[Stage, ...] = ("prefill", "decode", "hybrid")
LLAMA_3_1_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


def read(layout: ModelLayout, **changes: Any) -> Any:
    return layout.read_config(HFConfig({**layout.tiny, **changes}, "config.json"))


def checkpoint(layout: ModelLayout, config: Any) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes as the layout expects them."""
    return {part.name: part.shape for w in layout.weights(config) for part in w.parts if w.tied_to is None}


# configs


def test_llama_3_1_8b_has_291_tensors_and_8_030_261_248_parameters() -> None:
    config = LLAMA.read_config(HFConfig(LLAMA_3_1_8B))
    weights = list(LLAMA.weights(config))
    shapes = checkpoint(LLAMA, config)
    assert len(shapes) == 291
    assert sum(prod(shape) for shape in shapes.values()) == 8_030_261_248
    assert sum(weight.num_elements for weight in weights) == 8_030_261_248
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert config.rope[""].base == 500000.0
    assert config.rope[""].scaling["rope_type"] == "llama3"


def test_qwen3_0_6b_has_heads_wider_than_the_hidden_size_and_norms_on_them() -> None:
    sizes = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    more = {"intermediate_size": 3072, "vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": True}
    config = QWEN3.read_config(HFConfig({**sizes, **more}))
    shapes = checkpoint(QWEN3, config)
    assert len(shapes) == 310
    assert sum(prod(shape) for shape in shapes.values()) == 596_049_920
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (128,)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (1024, 2048)


def test_defaults_follow_from_earlier_names_or_for_null_from_the_config_class() -> None:
    config = LLAMA.read_config(HFConfig({k: v for k, v in LLAMA.tiny.items() if k != "num_key_value_heads"}))
    assert (config.Nkv, config.D, config.window) == (4, 16, None)
    assert read(LLAMA, head_dim=None).D == 16
    assert read(LLAMA, sliding_window=32).window is None  # which transformers ignores, too
    mistral = MODELS["mistral"]
    assert (read(mistral).window, read(mistral, sliding_window=None).window) == (32, None)
    assert mistral.read_config(HFConfig({k: v for k, v in LLAMA.tiny.items() if k != "sliding_window"})).window == 4096


def test_rope_is_found_in_both_forms() -> None:
    new = read(LLAMA, rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0})
    old = read(LLAMA, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert new.rope[""].base == old.rope[""].base == 5e5
    assert new.rope[""].scaling["rope_type"] == old.rope[""].scaling["rope_type"] == "linear"
    assert read(LLAMA, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}).rope[""].scaling is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"num_key_value_heads": 3},
        "config.json: requires num_attention_heads % num_key_value_heads == 0, but num_attention_heads is 4, "
        "num_key_value_heads is 3",
    ),
    ({"head_dim": 5}, "config.json: requires head_dim % 2 == 0, but head_dim is 5"),
    ({"hidden_act": "gelu"}, "config.json: requires hidden_act == 'silu', but hidden_act is 'gelu'"),
    ({"hidden_size": None}, "config.json: 'hidden_size': expected an integer, got null"),
    ({"hidden_size": "64"}, "config.json: 'hidden_size': expected an integer, got '64'"),
    ({"hidden_size": True}, "config.json: 'hidden_size': expected an integer, got true"),
    ({"num_hidden_layers": -1}, "config.json: 'num_hidden_layers': expected a size of 1 to 2147483647, got -1"),
    ({"rms_norm_eps": float("nan")}, "config.json: 'rms_norm_eps': expected a finite number, got nan"),
    ({"tie_word_embeddings": 1}, "config.json: 'tie_word_embeddings': expected true or false, got 1"),
    ({"rope_scaling": [1]}, "config.json: 'rope_scaling': expected an object, got a list"),
    (
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        "config.json: rope scaling 'su' is not supported; known are default, linear, dynamic, yarn, llama3, longrope",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_config_that_cannot_be_is_refused_by_its_keys(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(LLAMA, **changes)
    assert str(caught.value) == message


OLD_FALCON = {"n_head": 12, "num_attention_heads": None, "hidden_size": 96}


def test_errors_name_the_key_that_the_config_has() -> None:
    """Falcon reads `num_attention_heads`, or in older configs `n_head`."""
    falcon = MODELS["falcon"]
    config = read(falcon, **OLD_FALCON)
    with pytest.raises(ConfigError, match="tensor_parallel_size=8 does not divide n_head=12"):
        falcon.shard_config(config, 8)
    hf = HFConfig({"n_head": 5, "width": 12}, "old.json")
    heads, width = hf.size("num_attention_heads", "n_head"), hf.size("width")
    with pytest.raises(ConfigError) as caught:
        hf.require(
            width % heads == 0,
            "width % num_attention_heads == 0",
            ("width", width),
            ("num_attention_heads", heads),
        )
    assert str(caught.value) == "old.json: requires width % n_head == 0, but width is 12, n_head is 5"


def test_qwen3_refuses_windows_without_a_width() -> None:
    with pytest.raises(ConfigError) as caught:
        read(QWEN3, use_sliding_window=True, sliding_window=None)
    rule = "requires not use_sliding_window or sliding_window is not null"
    assert str(caught.value) == f"config.json: {rule}, but use_sliding_window is true, sliding_window is null"


def test_config_reader_takes_lists_texts_and_optional_numbers() -> None:
    hf = HFConfig({"a": [1], "b": "x", "c": {"d": 2.5}}, "x.json")
    assert (hf.list("a"), hf.str("b"), hf.opt_float("c.d"), hf.opt_float("c.e")) == ([1], "x", 2.5, None)
    assert (hf.int("n", "m", default=3), hf.float("f", default=1), hf.list("z"), hf.mapping("z")) == (3, 1, None, None)
    for wrong, message in [
        (lambda: hf.list("b"), "x.json: 'b': expected a list, got 'x'"),
        (lambda: hf.int("c.d"), "x.json: 'c.d': expected an integer, got 2.5"),
        (lambda: hf.int("n", "m"), "x.json: the key 'n' is missing, expected an integer (also looked for m)"),
        (lambda: hf.bool("c"), "x.json: 'c': expected true or false, got an object"),
    ]:
        with pytest.raises(ConfigError) as caught:
            wrong()
        assert str(caught.value) == message


# tensor parallelism


def test_a_rank_gets_its_share_of_heads_and_feed_forward() -> None:
    share = LLAMA.shard_config(read(LLAMA), 2)
    assert (share.Nq, share.Nkv, share.I, share.H, share.V, share.tp) == (2, 1, 48, 64, 128, 2)


def test_ranks_beyond_the_number_of_key_heads_have_copies() -> None:
    config = read(LLAMA)
    share = LLAMA.shard_config(config, 4)
    assert (config.Nkv, share.Nq, share.Nkv, LLAMA.cache(share).k) == (2, 1, 1, (1, 16))
    spec = next(spec for spec in LLAMA.weights(config) if spec.name == "layers.0.attention.wqkv")
    assert share_shape(spec, 4) == (3 * 16, 64)
    # 4 query heads, 2 key heads and 2 value heads of 16 rows: the first two query heads read the first key head.
    assert [share_runs(spec, rank, 4) for rank in range(4)] == [
        ((16 * rank, 16), (64 + 16 * (rank // 2), 16), (96 + 16 * (rank // 2), 16)) for rank in range(4)
    ]
    rows = rank_shard(spec, torch.arange(128)[:, None].expand(128, 64), 3, 4)[:, 0]
    assert rows.tolist() == [*range(48, 64), *range(80, 96), *range(112, 128)]


def test_a_size_that_depends_on_the_key_heads_is_computed_for_the_rank() -> None:
    sizes = MODELS["falcon"].tiny | {"new_decoder_architecture": False, "num_ln_in_parallel_attn": 1}
    config = MODELS["falcon"].read_config(HFConfig(sizes, "tiny"))
    share = MODELS["falcon"].shard_config(config, 2)
    assert (config.Nkv, share.Nkv) == (1, 1)
    assert (share.Nq, share.G) == (config.Nq // 2, config.G // 2)


@pytest.mark.parametrize(
    ("tp", "changes", "message"),
    [
        (
            3,
            {"num_attention_heads": 6},
            "tensor_parallel_size=3 does not divide num_key_value_heads=2; use a divisor of 2",
        ),
        (2, {"intermediate_size": 9}, "tensor_parallel_size=2 does not divide intermediate_size=9; use a divisor of 9"),
    ],
)
def test_a_degree_that_does_not_divide_is_refused(tp: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLAMA.shard_config(read(LLAMA, **changes), tp)
    assert str(caught.value) == message


@pytest.mark.parametrize(("size", "tp", "padded"), [(49159, 2, 49216), (49159, 3, 49344), (128, 4, 128), (10, 4, 64)])
def test_a_vocabulary_is_padded_where_the_degree_does_not_divide_it(size: int, tp: int, padded: int) -> None:
    assert (padded_vocab(size, tp), vocab_share(size, tp)) == (padded, padded // tp)
    config = read(LLAMA, vocab_size=size, num_attention_heads=12, num_key_value_heads=12, head_dim=16)
    spec = next(LLAMA.weights(config))
    assert share_shape(spec, tp) == (padded // tp, 64)
    runs = [share_runs(spec, rank, tp) for rank in range(tp)]
    assert [start + i for ((start, count),) in runs for i in range(count)] == list(range(size))
    local = expand_block(LLAMA, config, "decode", ParallelConfig(tensor_parallel_size=tp))
    assert local.weights["lm_head"].shape == (padded // tp, 64)
    assert local.outputs[0].shape[-1] == size


@pytest.mark.parametrize("layout", MODELS.values(), ids=lambda layout: layout.name)
def test_sharded_weights_match_the_graph_of_a_rank(layout: ModelLayout) -> None:
    config = read(layout, attention_bias=True)
    local = expand_block(layout, config, layout.phases[0], ParallelConfig(tensor_parallel_size=2)).weights
    for weight in layout.weights(config):
        shape = list(weight.shape)
        if weight.shard is not None and weight.shard.kind != "first":
            shape[weight.shard.dim] //= 2
        assert local[weight.name].shape == tuple(shape)


def test_every_result_that_is_partial_is_reduced_once() -> None:
    graph = build_block_graph(LLAMA, read(LLAMA), "prefill", ParallelConfig(tensor_parallel_size=2))
    reduced = [node.inputs[0].name for node in graph.nodes.values() if node.op == "all_reduce"]
    assert reduced == ["x", "L0.a", "L0.f", "L1.a", "L1.f"]
    assert [node.inputs[0].name for node in graph.nodes.values() if node.op == "all_gather"] == ["logits"]


# checkpoints


def test_a_matching_checkpoint_with_or_without_a_tied_head() -> None:
    tied = read(LLAMA, tie_word_embeddings=True)
    shapes = checkpoint(LLAMA, tied)
    assert "lm_head.weight" not in shapes
    assert check_checkpoint(LLAMA, tied, shapes) == []
    assert check_checkpoint(LLAMA, tied, {**shapes, "lm_head.weight": (128, 64)}) == []
    assert check_checkpoint(LLAMA, read(LLAMA), checkpoint(LLAMA, read(LLAMA))) == []


def test_every_problem_of_a_checkpoint_is_reported_at_once() -> None:
    config = read(LLAMA)
    shapes = checkpoint(LLAMA, config)
    del shapes["model.layers.1.self_attn.k_proj.weight"]
    shapes["model.norm.weight"] = (65,)
    shapes["model.layers.0.self_attn.q_proj.bias"] = (64,)
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    assert check_checkpoint(LLAMA, config, shapes) == [
        "missing tensor 'model.layers.1.self_attn.k_proj.weight' [32, 64], which fills layers.1.attention.wqkv",
        "tensor 'model.norm.weight': expected [64] for norm, got [65]",
        "tensor 'model.layers.0.self_attn.q_proj.bias' [64] is unused by the layout",
    ]


def test_tensors_are_those_of_transformers(make_checkpoint: Callable[..., Any]) -> None:
    """The names and shapes that transformers writes are the ones that the layouts read."""
    for family, layout, extra in (("Llama", LLAMA, {"attention_bias": True}), ("Qwen3", QWEN3, {"head_dim": 24})):
        folder = make_checkpoint(family, **extra)
        data = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        assert check_checkpoint(layout, layout.read_config(HFConfig(data)), shapes) == []


# graphs


def expand_block(layout: ModelLayout, config: Any, stage: Stage, parallel: ParallelConfig) -> ExecutionGraph:
    graph = build_block_graph(layout, config, stage, parallel, dtype="f32")
    verify(graph)
    expanded = expand(graph, layout, graph.model_config)
    verify(expanded)
    return expanded


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_flattened_layout(name: str, snapshot: SnapshotAssertion, memo: LinkMemo) -> None:
    assert layout_text(driver.load_and_link(memo=memo).models[name]) == snapshot


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_block_and_kernel_graph(name: str, stage: Stage, snapshot: SnapshotAssertion) -> None:
    config = read(MODELS[name], num_hidden_layers=1)
    graph = build_block_graph(MODELS[name], config, stage, dtype="f32")
    assert to_text(graph) == snapshot(name="block")
    assert to_text(expand(graph, MODELS[name], graph.model_config)) == snapshot(name="kernel")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize(
    ("layout", "stage"),
    [pytest.param(one, stage, id=f"{one.name}-{stage}") for one in MODELS.values() for stage in one.phases],
)
def test_graphs_keep_the_rules_at_both_levels(layout: ModelLayout, stage: Stage, tp: int, pp: int) -> None:
    config = read(layout, attention_bias=True, mlp_bias=True)
    graph = build_block_graph(layout, config, stage, ParallelConfig(tp, pp))
    verify(graph)
    expanded = expand(graph, layout, graph.model_config)
    verify(expanded)
    assert not [node for node in expanded.nodes.values() if node.block and not node.origins]
    assert {node.layer_id for node in expanded.nodes.values()} == {None, *range(config.L)}
    assert (
        [ref.dtype for ref in expanded.outputs] == ["f32", "i64"] if layout.generates else ["f32"] * len(layout.returns)
    )


def test_expansion_writes_the_body_of_each_layer() -> None:
    """Later layers are stamped from the first; they must be what the body itself would have written."""
    graph = build_block_graph(QWEN3, read(QWEN3), "prefill", dtype="f32")
    nodes = expand(graph, QWEN3, graph.model_config).nodes.values()
    shown = {
        i: [(n.op, n.attrs, [r.name.replace(f"L{i}.", "L.").replace(f"layers.{i}.", "layers.") for r in n.inputs])
            for n in nodes if n.layer_id == i and n.block]
        for i in (0, 1)
    }  # fmt: skip
    assert shown[0] == shown[1]
    assert len(shown[0]) == 13


def test_expand_keeps_order_and_loads_that_passes_gave() -> None:
    graph = build_block_graph(LLAMA, read(LLAMA), "decode", dtype="f32")
    load = graph.nodes["L1.kv_load"]
    load.metadata["tier"] = "host"
    load.stream_id = 2
    graph.add_edge("L0.n", "L1.kv_load")
    graph.nodes["L1.f"].stream_id = 1
    expanded = expand(graph, LLAMA, graph.model_config)
    assert "L0.kv_load" not in expanded.nodes
    assert expanded.nodes["L1.kv_load"].dependencies == {"L0.n"}
    assert "L1.kv_load" in expanded.nodes["L1.attention.qkv"].dependencies
    assert {n.stream_id for n in expanded.nodes.values() if n.layer_id == 1 and n.block == "ffn"} == {1}


def test_expand_refuses_a_kernel_graph() -> None:
    graph = build_block_graph(LLAMA, read(LLAMA), "decode")
    kernels = expand(graph, LLAMA, graph.model_config)
    with pytest.raises(ValueError, match=r"graph 'llama_decode': expected a block-level graph with a stage"):
        expand(kernels, LLAMA, graph.model_config)
    with pytest.raises(ValueError, match=r"L0\.a: unknown block 'mixer' in layout 'llama'"):
        graph.nodes["L0.a"].block = "mixer"
        expand(graph, LLAMA, graph.model_config)


def test_eighty_layers_are_built_and_expanded_in_a_blink() -> None:
    """Aim: 40 ms on an idle core. The bound is loose, since test machines are shared."""
    config = read(LLAMA, num_hidden_layers=80)
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        graph = build_block_graph(LLAMA, config, "decode")
        expanded = expand(graph, LLAMA, graph.model_config)
        times.append(time.perf_counter() - start)
    assert (len(graph.nodes), len(expanded.nodes)) == (565, 1205)
    assert min(times) < 0.2
