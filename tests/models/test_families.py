"""Snapshots of every layout: its flattened text and its graphs on the tiny config, one file each."""

import pytest
from syrupy.assertion import SnapshotAssertion

from sageLLM.codegen import driver
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.layout_text import layout_text
from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.ir.text import to_text
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.builder import build_block_graph
from sageLLM.runtime.execution_graph.expand import expand

FAMILIES = [name for name in MODELS if name not in ("llama", "qwen3")]  # these two are in test_layout.py


@pytest.mark.parametrize("name", FAMILIES)
def test_flattened_layout(name: str, text_file: SnapshotAssertion, memo: LinkMemo) -> None:
    assert layout_text(driver.load_and_link(memo=memo).models[name]) == text_file


@pytest.mark.parametrize("name", FAMILIES)
def test_graphs(name: str, text_file: SnapshotAssertion) -> None:
    """The kernel graphs of all stages, and the block graph of the last one (hybrid, where there is a KV cache)."""
    layout = MODELS[name]
    config = layout.read_config(HFConfig({**layout.tiny}))
    texts = []
    for stage in layout.phases:
        graph = build_block_graph(layout, config, stage, dtype="f32")
        texts += [to_text(graph)] if stage == layout.phases[-1] else []
        texts.append(to_text(expand(graph, layout, graph.model_config)))
    assert "\n".join(texts) == text_file
