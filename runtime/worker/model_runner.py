"""Runs the model on one device: the weights, a KV pool, and one plan per stage."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.execution_graph.kv_loads import load_kv
from sageLLM.runtime.execution_graph.stages import received_values
from sageLLM.runtime.executor.buckets import MAX_ROWS, Buckets, row_buckets, table_widths
from sageLLM.runtime.executor.cuda_graphs import DevicePlan, GraphedPlan
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.native.calls import number_of
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.executor.planner import Runnable
from sageLLM.runtime.executor.token_reader import PendingTokens
from sageLLM.runtime.kernels.cpu.callables import TORCH_DTYPES
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.worker.io_report import IoReport, report_io
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.lower_blocks import lower_blocks
from sageLLM.runtime.worker.micro_batch_inputs import MicroBatchInputs
from sageLLM.runtime.worker.sequences import DecodeBatch, SequenceChunk
from sageLLM.runtime.worker.step_inputs import Draws, Inputs, StepInputs


class Logits(NamedTuple):
    """Logits f32[S, V] of the S requested rows, and their greedy tokens i64[S], which the graph computes.

    Ranks that share the vocabulary have the `values` of their tokens and padding, and `best` f32[S], the logits of the
    greedy tokens. On a GPU `tokens` are the greedy tokens on their way to the host.
    """

    values: Tensor
    greedy_ids: Tensor
    best: Tensor | None = None
    tokens: PendingTokens | None = None


class ModelRunner:
    """Computes logits. Graphs are built and optimised once per stage, on first use, with symbolic sizes.

    All plans share one arena, since only one step runs at a time. A step is divided into `num_ubatches` micro-batches
    if it has a row for each.
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        compiler: ModelCompiler,
        *,
        num_ubatches: int = 1,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """Of a pool on a GPU the last block is for padding. `max_rows` are the rows of the largest decode step."""
        self.model = model
        self.pool = pool
        self.compiler = compiler
        self._bound = {**model.bound_tensors(), **pool.named_tensors()}
        max_blocks = min(-(-model.max_model_len // pool.block_size), pool.num_blocks)
        self.buckets = None
        if compiler.planner.device is not None:
            rows = row_buckets(max_rows) if compiler.planner.captures and num_ubatches == 1 else ()
            self.buckets = Buckets(rows, table_widths(max_blocks), padding_block=pool.num_blocks - 1)
        self.step_inputs = StepInputs(
            pool.block_size, max_blocks, model.tables, self.buckets, num_batches=model.pipeline_stage.count
        )
        self._arena = Arena()
        self._plans: dict[tuple[Stage, int], Runnable] = {}
        self._lower_plans: dict[Stage, Runnable] = {}
        self._parts = MicroBatchInputs(num_ubatches)
        # Pipeline stages overlap their decode steps, among which the scheduler has divided the requests.
        self._divides_decodes = model.pipeline_stage.count == 1 or model.config.tp > 1
        # Read in each step, in which the microseconds count.
        self._is_first_stage, self._is_last_stage = model.pipeline_stage.is_first, model.pipeline_stage.is_last
        self._stage_inputs = ReceivedInputs(model.device)
        self._watches_layers = False
        self._is_first_run = False
        self._watched: NativePlan | None = None

    def plan(self, stage: Stage, num_ubatches: int = 1) -> Runnable:
        """The plan of a stage: the optimised kernel graph, flattened, with weights and caches bound."""
        key = stage, num_ubatches
        if key not in self._plans:
            graph = self.compiler.kernel_graph(stage, num_ubatches)
            self._plans[key] = self.compiler.plan(graph, self._bound, self._arena)
        return self._plans[key]

    def lower_plan(self, stage: Stage) -> Runnable:
        """The plan of a stage that loads blocks of the lower pool, and writes blocks back to it."""
        if stage not in self._lower_plans:
            graph = load_kv(self.compiler.kernel_graph(stage), self.pool.lower_tier, self.pool.staging_bytes)
            self._lower_plans[stage] = self.compiler.plan(graph, self._bound, self._arena)
        return self._lower_plans[stage]

    def watch_layers(self) -> None:
        """Lets `is_complete` tell the progress of steps."""
        self._watches_layers = True

    def begin_step(self) -> None:
        """The next run is the first one of a step. After a failure a step has others, for parts of its sequences."""
        self._is_first_run = True

    def is_complete(self, layer: int) -> bool:
        """Whether the first run of the step has computed the KV of a layer of the model; called by other threads.

        False when that run has ended, and for plans without native calls: their layers are complete with the step.
        """
        plan = self._watched
        return plan is not None and plan.progress is not None and plan.progress.is_complete(layer)

    def io_reports(self, hardware: Hardware) -> list[IoReport]:
        """The transfers between tiers of each plan that has some, planned with the rates of the hardware."""
        plans = [*self._plans.values(), *self._lower_plans.values()]
        return [report for plan in plans if (report := report_io(plan, hardware)) is not None]

    def run(
        self,
        stage: Stage,
        decodes: DecodeBatch,
        chunks: Sequence[SequenceChunk],
        rows: Sequence[int],
        draws: Draws | None = None,
    ) -> Logits | None:
        """Computes the last token of each of `decodes` and the chunks, writes their KV, and returns logits of `rows`.

        Token rows number the decodes first and then the tokens of the chunks. A GPU draws tokens with `draws`. The
        result is valid until the next step.
        A pipeline stage before the last one sends its result to the next stage and returns None.
        """
        if not torch.is_inference_mode_enabled():  # the worker's thread is always in it, as entering it takes time
            with torch.inference_mode():
                return self.run(stage, decodes, chunks, rows, draws)
        inputs, num_ubatches = self.step_inputs.make(decodes, chunks, rows, draws), self._parts.num_parts
        blocks = {} if self.pool.lower is None else lower_blocks(inputs, self.pool)
        num_tokens = len(decodes)
        if chunks:
            num_tokens += sum(chunk.num_tokens for chunk in chunks)
        if blocks:
            inputs, num_ubatches = {**inputs, **blocks}, 1
        if num_ubatches > 1:
            if num_tokens < num_ubatches or (stage == "decode" and not self._divides_decodes):
                num_ubatches = 1
            else:
                inputs = self._parts.divide(inputs, len(decodes), chunks)
        plan = self.lower_plan(stage) if blocks else self.plan(stage, num_ubatches)
        if self._watches_layers and self._is_first_run and isinstance(plan, NativePlan):
            self._watched = plan.watch_layers()
        self._is_first_run = False
        try:
            outputs = self._run_plan(plan, num_ubatches, inputs, num_tokens)
        finally:
            self._watched = None
        if not self._is_last_stage:
            return None
        values, greedy_ids, *best = outputs
        tokens = plan.tokens if isinstance(plan, DevicePlan) else None
        return Logits(values, greedy_ids, best[0] if best else None, tokens)

    def can_follow(self, num_decodes: int) -> bool:
        """Whether a step of so many decodes can start with the tokens of the last one on the device (`run_after`)."""
        rows = () if self.buckets is None else self.buckets.rows
        return bool(rows) and num_decodes <= rows[-1] and self._is_captured

    @cached_property
    def _is_captured(self) -> bool:
        plan = self.plan("decode")
        return isinstance(plan, GraphedPlan) and plan.num_captured > 0

    def run_after(self, decodes: DecodeBatch, rows: Sequence[int], draws: Draws | None) -> Logits:
        """As `run` of the decodes of the last step, whose tokens need not be known yet."""
        plan = self.plan("decode")
        assert isinstance(plan, GraphedPlan), "can_follow has been asked"
        values, greedy_ids, *_ = plan.run_after_last(self.step_inputs.make(decodes, [], rows, draws))
        return Logits(values, greedy_ids, tokens=plan.tokens)

    def _run_plan(self, plan: Runnable, num_ubatches: int, inputs: Inputs, num_tokens: int) -> list[Tensor]:
        if not self._is_first_stage:
            inputs = self._stage_inputs.added_to(inputs, plan, num_tokens)
        return plan.run(inputs)


class ReceivedInputs:
    """Memory for the values that a pipeline stage receives, reused from step to step.

    As are the inputs with it, so that a step like the one before is prepared no further.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[Runnable, list[TensorRef]] = {}
        self._buffers: dict[str, Tensor] = {}
        self._last: tuple[Inputs, Runnable, int] | None = None
        self._inputs: Inputs = {}

    def added_to(self, inputs: Inputs, plan: Runnable, num_tokens: int) -> Inputs:
        """The inputs of a step, and a buffer with a row per token for each value that the plan receives."""
        last = self._last
        if last is None or inputs is not last[0] or plan is not last[1] or num_tokens != last[2]:
            if plan not in self._values:
                self._values[plan] = received_values(plan.graph)
            buffers = {ref.name: self._buffer(ref, num_tokens) for ref in self._values[plan]}
            self._last, self._inputs = (inputs, plan, num_tokens), {**inputs, **buffers}
        return self._inputs

    def _buffer(self, ref: TensorRef, num_tokens: int) -> Tensor:
        buffer = self._buffers.get(ref.name)
        if buffer is None or len(buffer) < num_tokens:
            width = [number_of(dim, {}) for dim in ref.shape[1:]]
            num_rows = num_tokens if buffer is None else max(num_tokens, 2 * len(buffer))
            buffer = torch.empty((num_rows, *width), dtype=TORCH_DTYPES[ref.dtype], device=self._device)
            self._buffers[ref.name] = buffer
        return buffer[:num_tokens]
