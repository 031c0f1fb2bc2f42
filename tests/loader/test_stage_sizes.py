"""Pipeline stages are divided by the weights that they read: every layer once, and the largest stage minimal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.stage_sizes import (
    WeightReads,
    balanced_sizes,
    choose_sizes,
    parse_partition,
    vllm_sizes,
    weight_reads,
)
from sageLLM.runtime.execution_graph.stages import PipelineStage

from .test_stage_weights import stages

LLAMA = MODELS["llama"]
SHAPE_135M = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def every_division(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    cuts = combinations(range(1, num_layers), num_stages - 1)
    return [tuple(end - start for start, end in pairwise((0, *cut, num_layers))) for cut in cuts]


@given(
    st.integers(0, 40),
    st.lists(st.integers(1, 20), min_size=1, max_size=9),
    st.integers(0, 100),
    st.integers(1, 9),
)
def test_the_largest_stage_is_as_small_as_in_the_best_division(
    before: int, layers: list[int], after: int, num_stages: int
) -> None:
    num_stages = min(num_stages, len(layers))
    reads = WeightReads(before, tuple(layers), after)
    sizes = balanced_sizes(reads, num_stages)
    assert len(sizes) == num_stages and min(sizes) > 0
    layers_of = [list(PipelineStage(i, sizes).layers(len(layers))) for i in range(num_stages)]
    assert [layer for stage in layers_of for layer in stage] == list(range(len(layers)))
    assert sum(reads.of_stages(sizes)) == before + sum(layers) + after

    def badness(division: tuple[int, ...]) -> tuple[int, int]:
        found = reads.of_stages(division)
        return max(found), sum(cost * cost for cost in found)

    assert badness(sizes) == min(map(badness, every_division(len(layers), num_stages)))


def test_the_head_counts_and_the_embedding_does_not() -> None:
    config = LLAMA.read_config(HFConfig({**LLAMA.tiny, **SHAPE_135M}))
    reads = weight_reads(LLAMA, config)
    layer = 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576)
    assert reads == WeightReads(0, (layer,) * 30, 2 * 576 * 49152 + 2 * 576)
    assert choose_sizes(LLAMA, config, 1) == (30,)
    assert choose_sizes(LLAMA, config, 2) == (19, 11)
    assert choose_sizes(LLAMA, config, 4) == (9, 9, 10, 2)


@pytest.mark.parametrize(
    ("num_layers", "sizes"), [(30, (15, 15)), (5, (3, 2)), (7, (2, 2, 2, 1)), (30, (7, 8, 8, 7)), (29, (7, 7, 8, 7))]
)
def test_vllm_divides_layers_whatever_they_read(num_layers: int, sizes: tuple[int, ...]) -> None:
    """The divisions are those of `get_pp_indices` of vLLM 0.19."""
    config = LLAMA.read_config(HFConfig({**LLAMA.tiny, **SHAPE_135M, "num_hidden_layers": num_layers}))
    assert vllm_sizes(LLAMA, config, len(sizes)) == sizes
    with pytest.raises(ConfigError, match="is more than the"):
        vllm_sizes(LLAMA, config, num_layers + 1)


def test_dense_first_layers_are_cheaper_than_experts() -> None:
    layout = MODELS["deepseek_v3"]
    sizes = {"num_hidden_layers": 8, "first_k_dense_replace": 4, "n_routed_experts": 16, "vocab_size": 32}
    config = layout.read_config(HFConfig({**layout.tiny, **sizes}))
    reads = weight_reads(layout, config)
    assert max(reads.layers[:4]) < min(reads.layers[4:])
    assert choose_sizes(layout, config, 2)[0] > 4


@pytest.mark.parametrize("layout", MODELS.values(), ids=lambda one: one.name)
def test_all_phases_and_ranks_are_divided_alike(layout: ModelLayout) -> None:
    config = layout.read_config(HFConfig(layout.tiny, "tiny"))
    sizes = choose_sizes(layout, config, 2)
    for tp in (1, 2):
        for phase in layout.phases:
            graph = build_block_graph(layout, config, phase, ParallelConfig(tp, 2))
            devices = {node.layer_id: node.device_id for node in graph.nodes.values() if node.layer_id is not None}
            assert [devices[layer] for layer in range(config.L)] == [0] * sizes[0] + [1] * sizes[1]


def test_a_partition_is_taken_as_it_is(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("Llama", num_hidden_layers=5)
    one, two = stages(folder, 2, pp_layer_partition="1,4")
    assert (list(one.layers), list(two.layers)) == ([0], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("pp", "partition", "message"),
    [
        (2, "a,b", "pp_layer_partition must be numbers of layers such as '20,10', got 'a,b'"),
        (2, "5", "pp_layer_partition=5 must have a number for each of pipeline_parallel_size=2 stages"),
        (2, "5,1", "pp_layer_partition=5,1 must be positive, and add up to the 5 layers of llama"),
        (2, "5,0", "pp_layer_partition=5,0 must be positive, and add up to the 5 layers of llama"),
        (6, None, "pipeline_parallel_size=6 is more than the 5 layers of llama; use at most one stage per layer"),
    ],
)
def test_other_partitions_are_refused(
    make_checkpoint: Callable[..., Path], pp: int, partition: str | None, message: str
) -> None:
    folder = make_checkpoint("Llama", num_hidden_layers=5)
    with pytest.raises(CheckpointError) as caught:
        stages(folder, pp, pp_layer_partition=partition)
    assert str(caught.value) == f"{folder}: {message}"


def test_no_text_is_no_partition() -> None:
    assert parse_partition(None) is None
    assert parse_partition("3, 2") == (3, 2)
    with pytest.raises(ConfigError):
        parse_partition("")
