"""Layers that load blocks from the tier below: the same results, in an order that respects the staging buffers."""

from typing import Any

import pytest
import torch

from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.passes.check import verify_schedule
from sageLLM.runtime.execution_graph.kv_loads import load_kv
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.lower_blocks import lower_blocks

from .conftest import BLOCK_SIZE, NUM_BLOCKS

NUM_DEVICE_BLOCKS = 3


def split_pool(tiny: Any, caches: dict[str, torch.Tensor]) -> KVPool:
    """A pool with the contents of these caches, of which the blocks after the first three lie below the device."""
    shape, cpu = tiny.layout.cache(tiny.config), torch.device("cpu")
    lower = KVPool(tiny.config.L, NUM_BLOCKS - NUM_DEVICE_BLOCKS, BLOCK_SIZE, shape, torch.float32, cpu)
    pool = KVPool(tiny.config.L, NUM_DEVICE_BLOCKS, BLOCK_SIZE, shape, torch.float32, cpu, lower=lower)
    for layer, keys, values in pool.layers():
        for mine, below, name in ((keys, lower.keys, "k_cache"), (values, lower.values, "v_cache")):
            mine[:NUM_DEVICE_BLOCKS] = caches[f"layers.{layer}.{name}"][:NUM_DEVICE_BLOCKS]
            below[layer].copy_(caches[f"layers.{layer}.{name}"][NUM_DEVICE_BLOCKS:])
    return pool


@pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
@pytest.mark.parametrize("name", ["llama", "deepseek_v2", "gemma2", "bloom", "mixtral"])
def test_results_are_equal_bit_for_bit(name: str, make_tiny: Any, runner: Any) -> None:
    tiny = make_tiny(name, "f32")
    expected = tiny.bound()
    pool = split_pool(tiny, expected)
    bound = {**expected, **pool.named_tensors()}
    kernels, num_lower, slots = load_registry().kernels, 0, set()
    with torch.inference_mode():
        for stage, inputs in tiny.steps():
            graph = tiny.compiler.kernel_graph(stage)
            reference = [x.clone() for x in NativePlan(graph, runner, kernels, expected).run(inputs)]
            blocks = lower_blocks(inputs, pool)
            num_lower += bool(blocks)
            slots |= set(inputs["slots"].tolist())
            lower = load_kv(graph, "host", pool.staging_bytes) if blocks else graph
            found = NativePlan(lower, runner, kernels, bound, poison=True).run(inputs | blocks)
            assert all(torch.equal(x, y) for x, y in zip(found, reference, strict=True))
    assert num_lower >= 4, "the steps were meant to use lower blocks"
    assert pool.lower is not None
    for layer, keys, values in pool.layers():
        for mine, below, kind in ((keys, pool.lower.keys, "k_cache"), (values, pool.lower.values, "v_cache")):
            whole = torch.cat([mine[:NUM_DEVICE_BLOCKS], below[layer]])
            both = [cache.flatten(0, 1)[sorted(slots)] for cache in (whole, expected[f"layers.{layer}.{kind}"])]
            assert torch.equal(*both)


def test_loads_run_a_layer_ahead_and_wait_for_their_buffer(make_tiny: Any) -> None:
    graph = load_kv(make_tiny("qwen3", "f32").compiler.kernel_graph("decode"), "host", 2**20)
    verify(graph)
    verify_schedule(graph)
    order = list(graph.nodes)
    for layer in range(graph.num_layers):
        load, store = graph.nodes[f"L{layer}.k_loaded"], graph.nodes[f"L{layer}.k_stored"]
        assert (load.op_type.name, store.op_type.name) == ("KV_LOAD", "KV_MIGRATE")
        assert load.op == store.op == "kv_copy" and load.stream_id == store.stream_id == 1
        own = [node for node in graph.nodes.values() if node.layer_id == layer - 1 and node.stream_id == 0]
        assert all(order.index(load.node_id) < order.index(node.node_id) for node in own)
        if layer >= 2:
            before = graph.nodes[f"L{layer - 2}.k_stored"]
            assert before.node_id in load.dependencies
            assert order.index(before.node_id) < order.index(load.node_id)


def test_staged_blocks_are_shared_by_every_second_layer(make_tiny: Any) -> None:
    tiny = make_tiny("qwen3", "f32")
    pool = split_pool(tiny, tiny.bound())
    for layer, keys, _ in pool.layers():
        keys[NUM_DEVICE_BLOCKS:] = layer
    last = pool.num_layers - 1
    for layer, keys, _ in pool.layers():
        assert (keys[NUM_DEVICE_BLOCKS:] == last - (last - layer) % 2).all()
        assert not (keys[:NUM_DEVICE_BLOCKS] == keys[0, 0, 0, 0]).all()
