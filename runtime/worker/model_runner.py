"""Runs the model on one device: the weights, a KV pool, and one plan per stage."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.planner import Runnable
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.sequences import SequenceChunk, WorkerSequence
from sageLLM.runtime.worker.step_inputs import StepInputs


class Logits(NamedTuple):
    """Logits f32[S, V] of the S requested rows, and their greedy tokens i64[S], which the graph computes."""

    values: Tensor
    greedy_ids: Tensor


class ModelRunner:
    """Computes logits. Graphs are built and optimised once per stage, on first use, with symbolic sizes.

    All plans share one arena, since only one step runs at a time.
    """

    def __init__(self, model: Model, pool: KVPool, compiler: ModelCompiler) -> None:
        self.model = model
        self.pool = pool
        self.compiler = compiler
        self._bound = {**model.bound_tensors(), **pool.named_tensors()}
        max_blocks = min(-(-model.max_model_len // pool.block_size), pool.num_blocks)
        self.step_inputs = StepInputs(pool.block_size, max_blocks, model.device, model.tables)
        self._arena = Arena()
        self._plans: dict[Stage, Runnable] = {}

    def plan(self, stage: Stage) -> Runnable:
        """The plan of a stage: the optimised kernel graph, flattened, with weights and caches bound."""
        if stage not in self._plans:
            graph = self.compiler.kernel_graph(stage)
            self._plans[stage] = self.compiler.plan(graph, self._bound, self._arena)
        return self._plans[stage]

    @torch.inference_mode()
    def run(
        self, stage: Stage, decodes: list[WorkerSequence], chunks: Sequence[SequenceChunk], rows: Sequence[int]
    ) -> Logits:
        """Computes the last token of each of `decodes` and the chunks, writes their KV, and returns logits of `rows`.

        Token rows number the decodes first and then the tokens of the chunks. The result is valid until the next step.
        """
        logits, tokens = self.plan(stage).run(self.step_inputs.make(decodes, chunks, rows))
        return Logits(logits, tokens)
