"""Tests of tensor parallelism: the graphs of all ranks, run in lockstep in one process, compute one rank's logits.

Each rank is a thread with its share of the weights, its caches and its plan. Collectives meet at a barrier. Everything
is in float64, so that rounding cannot mask a wrong sum.
"""

import copy
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import lcm
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM.generated.builders import MODELS
from sageLLM.generated.kernels.reference.norm import rms_norm
from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout, Stage
from sageLLM.runtime.core.model.weights import by_experts
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.loader.tables import PositionTables
from sageLLM.runtime.loader.weights import rank_shard
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.worker.kv_pool import KVPool

BLOCK_SIZE, NUM_BLOCKS = 4, 16
LENGTHS = (5, 9, 2)
Kernel = Callable[..., Any]


def divisible(layout: ModelLayout, tp: int) -> Any:
    """The layout's tiny config, with the sizes that `tp` does not divide multiplied until it does.

    Two ranks have an odd vocabulary, so that their tables are padded.
    """
    data: dict[str, Any] = copy.deepcopy(dict(layout.tiny))
    keys = data[layout.root] if layout.root else data
    keys["vocab_size"] += 1 if tp == 2 else 0
    for _ in range(8):
        config = layout.read_config(HFConfig(data, layout.name))
        try:
            layout.shard_config(config, tp)
        except ConfigError as error:
            found = re.search(r"does not divide (\w+)=(\d+)", str(error))
            assert found is not None, f"{layout.name}: {error}"
            keys[found[1]] = lcm(int(found[2]), tp)
            continue
        return config
    raise AssertionError(f"{layout.name}: no small config is divided by {tp}")


def random_weights(layout: ModelLayout, config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for spec in layout.weights(config):
        if spec.tied_to is not None:
            weights[spec.name] = weights[spec.tied_to]
            continue
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        weights[spec.name] = noise * spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 1 + 0.3 * noise
    return weights


class Meeting:
    """Exchange of operands between the ranks; all of them must take part, and in the same collective."""

    def __init__(self, tp: int) -> None:
        self.barrier = threading.Barrier(tp, timeout=60)
        self.brought: list[tuple[str, Tensor]] = [("", torch.empty(0))] * tp

    def kernels(self, rank: int) -> dict[str, Kernel]:
        def all_reduce(x: Tensor, *, group: str) -> Tensor:
            return torch.stack(self.exchange(rank, f"all_reduce {group}", x)).sum(0)

        def all_gather(x: Tensor, *, W: int, group: str) -> Tensor:
            parts = self.exchange(rank, f"all_gather {group}", x)
            assert len(parts) == W
            return torch.cat(parts, -1)

        def allreduce_add_rms_norm(
            x: Tensor, p: Tensor, w: Tensor | None = None, *, eps: float, group: str
        ) -> tuple[Tensor, Tensor]:
            h = x + all_reduce(p, group=group)
            return rms_norm(h, w, eps=eps), h

        own = (all_reduce, all_gather, allreduce_add_rms_norm)
        return {kernel.__name__: kernel for kernel in own}

    def exchange(self, rank: int, what: str, x: Tensor) -> list[Tensor]:
        self.brought[rank] = (what, x)
        self.barrier.wait()
        names, parts = {name for name, _ in self.brought}, [part for _, part in self.brought]
        self.barrier.wait()
        assert names == {what}, f"the ranks meet in different collectives: {names}"
        return parts


class Rank:
    """One rank: its config, weights, tables, caches and plans."""

    def __init__(self, layout: ModelLayout, config: Any, weights: Mapping[str, Tensor], kernels: Mapping[str, Kernel]):
        registry = load_registry()
        pool = KVPool(config.L, NUM_BLOCKS, BLOCK_SIZE, layout.cache(config), torch.float64, torch.device("cpu"))
        tables = PositionTables(config, 64)
        self.bound = {**weights, **{name: table.double() for name, table in tables.tensors.items()}}
        for i, keys, values in pool.layers():
            self.bound |= {f"layers.{i}.k_cache": keys, f"layers.{i}.v_cache": values}
        self.compiler = ModelCompiler(layout, config, registry, dtype="f64")
        self.kernels = {**registry.kernels, **kernels}
        self.collectives = set(kernels)

    def run(self, stage: Stage, inputs: Mapping[str, Tensor | None]) -> Tensor:
        graph = self.compiler.kernel_graph(stage)
        nodes = [node for node in graph.nodes.values() if isinstance(node, OpNode)]
        alone = {node.op for node in nodes if "collective" in node.tags} - self.collectives
        assert not alone, f"every rank would run {alone} for itself"
        return Plan(graph, self.kernels, self.bound).run(inputs)[0]


def slots_of(blocks: list[int], start: int, num_tokens: int) -> list[int]:
    """The pool slots of the tokens start .. start + num_tokens - 1 of a sequence."""
    return [blocks[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE for t in range(start, start + num_tokens)]


def steps(vocab_size: int) -> list[tuple[Stage, dict[str, Tensor | None]]]:
    """A prefill of some prompts, then one decoded token of each."""
    generator = torch.Generator().manual_seed(1)
    blocks = [[1, 3], [2, 5, 7], [4]]
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    ids = torch.randint(0, vocab_size, (starts[-1] + len(LENGTHS),), generator=generator)
    prefill = {
        "ids": ids[: starts[-1]].int(),
        "pos": torch.cat([torch.arange(n) for n in LENGTHS]).int(),
        "slots": torch.tensor([s for b, n in zip(blocks, LENGTHS, strict=True) for s in slots_of(b, 0, n)]),
        "type_ids": torch.cat([torch.arange(n) % 2 for n in LENGTHS]).int(),
        "q_start": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": torch.tensor(LENGTHS, dtype=torch.int32),
        "rows": torch.tensor([0, 4, 13, 15], dtype=torch.int32),
    }
    decode = {
        "ids": ids[starts[-1] :].int(),
        "pos": torch.tensor(LENGTHS, dtype=torch.int32),
        "slots": torch.tensor([slots_of(b, n, 1)[0] for b, n in zip(blocks, LENGTHS, strict=True)]),
        "q_start": torch.arange(len(LENGTHS) + 1, dtype=torch.int32),
        "seq_lens": torch.tensor([n + 1 for n in LENGTHS], dtype=torch.int32),
        "rows": torch.arange(len(LENGTHS), dtype=torch.int32),
    }
    table = torch.tensor([[*b, *[0] * (3 - len(b))] for b in blocks], dtype=torch.int32)
    return [("prefill", {**prefill, "block_table": table}), ("decode", {**decode, "block_table": table})]


@torch.inference_mode()
def logits(
    layout: ModelLayout, config: Any, weights: Mapping[str, Tensor], tp: int, *, expert_parallel: bool = False
) -> list[list[Tensor]]:
    """By rank, the logits of every step."""
    meeting = Meeting(tp)
    specs = [by_experts(spec) if expert_parallel else spec for spec in layout.weights(config)]
    ep = tp if expert_parallel else 1
    ranks = []
    for rank in range(tp):
        own = replace(layout.shard_config(config, tp), rank=rank, ep=ep) if tp > 1 else config
        share = {spec.name: rank_shard(spec, weights[spec.name], rank, tp) for spec in specs}
        ranks.append(Rank(layout, own, share, meeting.kernels(rank)))

    def run(rank: Rank) -> list[Tensor]:
        try:
            with torch.inference_mode():
                return [rank.run(stage, inputs) for stage, inputs in steps(config.V) if stage in layout.phases]
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(tp) as pool:
        return list(pool.map(run, ranks))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_all_ranks_together_equal_one(name: str, tp: int) -> None:
    layout = MODELS[name]
    config = divisible(layout, tp)
    weights = random_weights(layout, config)
    (alone,) = logits(layout, config, weights, 1)
    for found in logits(layout, config, weights, tp):
        for step, wanted in zip(found, alone, strict=True):
            assert step.shape == wanted.shape
            torch.testing.assert_close(step, wanted, rtol=1e-9, atol=1e-9)
    assert float(alone[0].std()) > 1e-3, "logits that hardly differ would show nothing"


def has_experts(layout: ModelLayout) -> bool:
    return any(spec.shard is not None and spec.shard.experts for spec in layout.weights(divisible(layout, 2)))


@pytest.mark.parametrize("name", [name for name, layout in MODELS.items() if has_experts(layout)])
def test_ranks_with_whole_experts_equal_one(name: str) -> None:
    layout = MODELS[name]
    config = divisible(layout, 2)
    assert config.X % 2 == 0
    weights = random_weights(layout, config)
    (alone,) = logits(layout, config, weights, 1)
    for found in logits(layout, config, weights, 2, expert_parallel=True):
        for step, wanted in zip(found, alone, strict=True):
            torch.testing.assert_close(step, wanted, rtol=1e-9, atol=1e-9)


def test_every_layout_with_experts_can_divide_them() -> None:
    routed = {
        name
        for name, layout in MODELS.items()
        for spec in layout.weights(divisible(layout, 2))
        if len(spec.shape) == 3 and spec.shape[0] == getattr(divisible(layout, 2), "X", None)
    }
    assert routed == {name for name, layout in MODELS.items() if has_experts(layout)}
    assert len(routed) > 15
