"""A worker: one device with the weights, a KV pool, and a plan for each stage."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.engine.kv_pool import KVPool
from sageLLM.runtime.engine.step_inputs import StepInputs
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.pipeline import Pipeline
from sageLLM.runtime.executor.planner import Runnable
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.base import Batch, Chunk


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
        self._bound = {**model.bound_tensors(), **pool.named_tensors()}
        max_blocks = -(-model.max_model_len // pool.block_size)
        self.step_inputs = StepInputs(pool.block_size, max_blocks, model.device)
        self._arena = Arena()
        self._plans: dict[Stage, Runnable] = {}

    def plan(self, stage: Stage) -> Runnable:
        """The stage's plan: the optimised kernel graph, flattened, with weights and caches bound."""
        if stage not in self._plans:
            graph = self.pipeline.kernel_graph(stage)
            self._plans[stage] = self.pipeline.plan(graph, self._bound, self._arena)
        return self._plans[stage]

    @torch.inference_mode()
    def run(self, stage: Stage, decodes: Batch | None, chunks: Sequence[Chunk], rows: Sequence[int]) -> StepResult:
        """Computes the decodes, then the chunks, writes their KV, and returns the logits of the token rows `rows`.

        The result is valid until the next step.
        """
        logits, tokens = self.plan(stage).run(self.step_inputs.make(decodes, chunks, rows))
        return StepResult(logits, tokens)
