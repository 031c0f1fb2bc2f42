"""Tests of encoder layouts: their phase, the returns of their programs, and the graphs of embeddings."""

import pytest

from sageLLM.generated.builders import MODELS
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.builder import (
    DecodeBatch,
    ExecutionGraphBuilder,
    ModelConfig,
    PrefillBatch,
    build_block_graph,
)
from sageLLM.runtime.execution_graph.embedding import build_embedding_graph, poolings_of
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.registry.plugins import load_registry

BERT = MODELS["bert"]
TINY = BERT.read_config(HFConfig(BERT.tiny))


def test_an_encoder_has_one_phase_and_decoders_have_three() -> None:
    assert (BERT.phases, BERT.generates, BERT.hidden, BERT.pooled) == (("prefill",), False, "x", "pooled")
    llama = MODELS["llama"]
    assert (llama.phases, llama.generates, llama.hidden, llama.pooled) == (
        ("prefill", "decode", "hybrid"),
        True,
        "y",
        None,
    )
    assert poolings_of(BERT) == ("model", "first", "last", "mean", "none")
    assert poolings_of(llama) == ("first", "last", "mean", "none")


def test_other_phases_are_refused() -> None:
    wanted = "layout 'bert' has only the stage prefill, got decode: without a KV cache it reads whole sequences"
    with pytest.raises(ValueError) as caught:
        build_block_graph(BERT, TINY, "decode")
    assert str(caught.value) == wanted
    builder = ExecutionGraphBuilder(ModelConfig(2, 64, 4, 4, 96, 128, 256), layout="bert", dtype="f32")
    with pytest.raises(ValueError) as caught:
        builder.build_decode_graph(DecodeBatch(["a"], [4], 1))
    assert str(caught.value) == wanted


def test_the_time_of_attention_grows_with_the_squares_of_the_lengths() -> None:
    """One sequence of 128 tokens has twice the pairs of two with 64, and as many tokens."""
    builder = ExecutionGraphBuilder(ModelConfig(2, 64, 4, 4, 96, 128, 256), layout="bert", dtype="f32")
    one = builder.build_prefill_graph(PrefillBatch(["a"], [128], 128))
    two = builder.build_prefill_graph(PrefillBatch(["a", "b"], [64, 64], 128))
    assert one.nodes["L0.a"].estimated_time_us > two.nodes["L0.a"].estimated_time_us > 0
    assert one.nodes["L0.f"].estimated_time_us == two.nodes["L0.f"].estimated_time_us


def test_an_embedding_graph_contains_only_needed_nodes() -> None:
    llama = MODELS["llama"]
    compiler = ModelCompiler(llama, llama.read_config(HFConfig(llama.tiny)), load_registry(), dtype="f32")
    graph = compiler.embedding_graph("last", normalize=True)
    verify(graph)
    assert "lm_head" not in graph.weights
    assert "temperature" not in graph.inputs
    assert [node.op for node in graph.nodes.values()][-2:] == ["pool_last", "l2_norm"]
    assert [str(ref.shape) for ref in graph.outputs] == ["(B, 64)"]
    hidden = build_embedding_graph(BERT, TINY, "none", normalize=False, dtype="f32")
    assert "pooler" not in hidden.weights
    with pytest.raises(ValueError) as caught:
        build_embedding_graph(llama, compiler.config, "model", normalize=False, dtype="f32")
    assert str(caught.value) == "layout 'llama': expected one of the poolings first, last, mean, none, got 'model'"
