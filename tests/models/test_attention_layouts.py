"""Layouts that differ in positions and caches: flattened, and the graphs of their tiny models."""

import pytest
from syrupy.assertion import SnapshotAssertion

from sageLLM.codegen import driver
from sageLLM.codegen.model.layout_text import layout_text
from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.config import HFConfig
from sageLLM.runtime.core.layout import KvShape, Stage
from sageLLM.runtime.core.text import to_text
from sageLLM.runtime.engine.tables import alibi_slopes, make_tables
from sageLLM.runtime.execution_graph.builder import build_block_graph
from sageLLM.runtime.execution_graph.expand import expand

STAGES: tuple[Stage, ...] = ("prefill", "decode", "hybrid")
NAMES = ["gptj", "bloom"]


@pytest.mark.parametrize("name", NAMES)
def test_flattened_layout(name: str, snapshot: SnapshotAssertion) -> None:
    assert layout_text(driver.load_and_link().models[name]) == snapshot


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", NAMES)
def test_block_and_kernel_graph(name: str, stage: Stage, snapshot: SnapshotAssertion) -> None:
    layout = MODELS[name]
    graph = build_block_graph(layout, layout.read_config(HFConfig(layout.tiny)), stage, dtype="f32")
    graph.verify()
    assert to_text(graph) == snapshot(name="block")
    expanded = expand(graph, layout, graph.model_config)
    expanded.verify()
    assert to_text(expanded) == snapshot(name="kernel")


def test_alibi_slopes() -> None:
    """The paper's example of 8 heads; of 12, the four after the first 8 lie between those."""
    assert alibi_slopes(8, 8.0).tolist() == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(12, 8.0).tolist()[8:] == pytest.approx([2.0 ** -(k / 2) for k in (1, 3, 5, 7)])
    assert alibi_slopes(4, 16.0).tolist() == [2.0 ** -(4 * k) for k in range(1, 5)]


def test_a_rank_has_the_slopes_of_its_heads() -> None:
    layout = MODELS["bloom"]
    whole = layout.read_config(HFConfig(layout.tiny))
    both = layout.shard_config(whole, 2)
    assert make_tables(both, 1)["slopes"].tolist() == make_tables(whole, 1)["slopes"].tolist()[: whole.Nq // 2]


def test_what_is_kept_of_a_token() -> None:
    assert (KvShape((2, 8), (2, 8)).num_elements, KvShape((2, 8), (2, 8)).row) == (32, (2, 2, 8))
    assert (KvShape((2, 8), (2, 4)).num_elements, KvShape((2, 8), (2, 4)).row) == (24, (24,))
    assert (KvShape((1, 8), (1, 6), is_shared=True).num_elements, KvShape((1, 8), (1, 6), is_shared=True).row) == (
        8,
        (1, 8),
    )
