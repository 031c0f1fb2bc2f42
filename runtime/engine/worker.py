"""A worker: one device with the weights, a KV pool, and a plan for each stage."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.core.layout import Stage
from sageLLM.runtime.engine.kv_pool import KVPool
from sageLLM.runtime.engine.model import Model
from sageLLM.runtime.engine.step_inputs import step_inputs
from sageLLM.runtime.execution_graph.executor import Plan
from sageLLM.runtime.execution_graph.pipeline import Pipeline
from sageLLM.runtime.scheduler.base import Chunk, KVMigration


class StepResult(NamedTuple):
    """logits f32[S, V] and the graph's own (greedy) choice tokens i64[S] for the S rows that were asked for."""

    logits: Tensor
    tokens: Tensor


class Worker:
    """Runs steps. Graphs are built and optimised once per stage, on first use, with symbolic sizes."""

    def __init__(self, model: Model, pool: KVPool, pipeline: Pipeline) -> None:
        self.model = model
        self.pool = pool
        self.pipeline = pipeline
        self._bound = model.bound_tensors() | _cache_tensors(pool)
        self._plans: dict[Stage, Plan] = {}

    def plan(self, stage: Stage) -> Plan:
        """The stage's plan: the optimised kernel graph, flattened, with weights and caches bound."""
        if stage not in self._plans:
            graph = self.pipeline.kernel_graph(stage)
            self._plans[stage] = Plan(graph, self.pipeline.kernels, self._bound)
        return self._plans[stage]

    @torch.inference_mode()
    def run(self, stage: Stage, chunks: Sequence[Chunk], rows: Sequence[int]) -> StepResult:
        """Computes the chunks (decodes first), writes their KV, and returns the logits of the token rows `rows`."""
        inputs = step_inputs(chunks, rows, self.pool.block_size, self.model.device)
        logits, tokens = self.plan(stage).run(inputs)
        return StepResult(logits, tokens)


class Migrator:
    """Copies KV blocks from one worker's pool to another's by KV_MIGRATE nodes, one per layer."""

    def __init__(self, source: KVPool, target: KVPool, pipeline: Pipeline) -> None:
        graph = pipeline.migrate_graph()
        bound = {f"source.{name}": tensor for name, tensor in _cache_tensors(source).items()}
        bound |= {f"target.{name}": tensor for name, tensor in _cache_tensors(target).items()}
        self._plan = Plan(graph, pipeline.kernels, bound)
        self._device = target.keys[0].device

    @torch.inference_mode()
    def run(self, migrations: Sequence[KVMigration]) -> None:
        """Makes all the copies of a step at once."""
        sources = [block for migration in migrations for block in migration.source_blocks]
        targets = [block for migration in migrations for block in migration.target_blocks]
        blocks = torch.tensor([sources, targets], dtype=torch.int32, device=self._device)
        self._plan.run({"src_blocks": blocks[0], "dst_blocks": blocks[1]})


def _cache_tensors(pool: KVPool) -> dict[str, Tensor]:
    """The caches by the names that graphs use for them."""
    tensors = {}
    for layer, keys, values in pool.layers():
        tensors[f"layers.{layer}.k_cache"] = keys
        tensors[f"layers.{layer}.v_cache"] = values
    return tensors
