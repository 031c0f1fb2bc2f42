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
from sageLLM.runtime.scheduler.base import Chunk


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
        self._bound = model.bound_tensors() | pool.named_tensors()
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
