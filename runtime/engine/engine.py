"""The engine: continuous batching as a loop of schedule, run, sample, update.

In mode `strict` there are two workers, each with its own KV pool; the blocks of a prefilled request are copied from the
prefill worker's pool to the decode worker's.
"""

import itertools
import time
from collections.abc import Sequence as PySequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.engine.block_copies import Migrator, TieredPool
from sageLLM.runtime.engine.faults import LOG, NOT_FINITE, log_end, reason_of, reraise_unless_attributable
from sageLLM.runtime.engine.kv_pool import make_pool
from sageLLM.runtime.engine.outputs import Logprob, RequestOutput
from sageLLM.runtime.engine.requests import resolve_max_tokens, stop_rules, validate_params, validate_prompt
from sageLLM.runtime.engine.sampler import SampledTokens, SamplingBatch, sample
from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.engine.sequences import RequestGroup, Sequence, make_group
from sageLLM.runtime.engine.worker import StepResult, Worker
from sageLLM.runtime.errors import EngineError, PromptError, SamplingParamsError
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.kv.copies import KVStats, Tier
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.auto import ForecastChooser
from sageLLM.runtime.scheduler.base import Batch, Chunk, KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.batch import DecodeStepBatch
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.text.tokenizer import Tokenizer


class WorkerStep(NamedTuple):
    """The part of a step that one worker computes: a token for each of the decodes, and the chunks of prompts."""

    worker: Worker
    stage: Stage
    decodes: Batch | None
    chunks: list[Chunk]


class PromptRows(NamedTuple):
    """Rows of a step's logits that score a prompt: `rows` predict the tokens that follow `positions`."""

    group: RequestGroup
    positions: list[int]
    rows: slice


class Engine:
    """Serves requests on one model. `step()` advances all of them and returns those that changed.

    `prepare` checks a request without side effects, `submit` queues it, `add` does both.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        compiler: ModelCompiler,
        config: PDSchedulerConfig,
        budget: KVBudget,
        *,
        disk_folder: Path | None = None,
        objective: ServiceObjective | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`eos_token_ids` end an answer in addition to the tokenizer's."""
        self.model = model
        self.tokenizer = tokenizer
        eos_ids = eos_token_ids | (tokenizer.eos_token_ids if tokenizer else frozenset[int]())
        # A file may name ids that the model cannot produce; the sampler could not ban them.
        self._eos_ids = frozenset(token_id for token_id in eos_ids if token_id < model.config.V)
        self.is_strict = config.mode == "strict"

        def make_scheduler() -> PDScheduler:
            return PDScheduler(
                config,
                kv_budget=budget,
                max_model_len=model.max_model_len,
                clock=time.monotonic,
                mode_chooser=make_chooser(compiler, model.device.type, objective) if config.mode == "auto" else None,
            )

        self._make_scheduler = make_scheduler
        self.scheduler = make_scheduler()
        self.decoder = Worker(model, make_pool(model, budget.num_blocks, budget.block_size), compiler)
        self.prefiller = self.decoder
        if self.is_strict:
            blocks = budget.num_prefill_blocks or budget.num_blocks
            self.prefiller = Worker(model, make_pool(model, blocks, budget.block_size), compiler)
            graph = compiler.migrate_graph()
            self._migrator = Migrator(self.prefiller.pool, self.decoder.pool, graph, compiler.kernels)
        tier_sizes: dict[Tier, int] = {"host": budget.num_host_blocks, "disk": budget.num_disk_blocks}
        self._tiers = TieredPool(self.decoder.pool, tier_sizes, compiler, disk_folder)
        self.num_steps = 0
        self._groups: dict[str, RequestGroup] = {}
        self._sequences: dict[str, Sequence] = {}
        self._failed: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self._groups)

    def kv_stats(self) -> dict[str, KVStats]:
        """Sizes and counters of each worker's KV pool: prefix cache hits, swaps, forks."""
        kv = self.scheduler.kv
        if self.is_strict:
            return {"prefill": kv.prefill.stats(), "decode": kv.decode.stats()}
        return {"worker": kv.decode.stats()}

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache, for example to measure without hits."""
        self.scheduler.kv.prefill.reset_prefix_cache()

    def add(self, group_id: str, prompt: str | None, token_ids: list[int], params: SamplingParams) -> None:
        """Checks and queues a request. Raises RequestError, and changes nothing, for one that cannot be served."""
        self.submit(self.prepare(group_id, prompt, token_ids, params))

    def prepare(self, group_id: str, prompt: str | None, token_ids: list[int], params: SamplingParams) -> RequestGroup:
        """Checks a request and makes its sequences, without queueing it. Raises RequestError if it cannot be served."""
        validate_prompt(token_ids, self.model.config.V, self.model.max_model_len)
        validate_params(params, self.model.config.V)
        self._check_kv_room(params, len(token_ids))
        rules = stop_rules(params, self._eos_ids, len(token_ids), self._max_seq_len)
        return make_group(group_id, prompt, token_ids, params, rules, self.tokenizer)

    @property
    def _max_seq_len(self) -> int:
        """The longest prompt with its answer, in tokens: that of the model, or of the KV cache if it holds less."""
        return self.scheduler.max_seq_len or self.model.max_model_len

    def _check_kv_room(self, params: SamplingParams, prompt_len: int) -> None:
        """Refuses a request that would end early because the KV cache cannot hold it even when it is alone."""
        room = self.scheduler.limits.max_kv_tokens
        if room is None:
            return
        if prompt_len >= room:
            raise PromptError(
                f"the prompt must have at most {room - 1} tokens, one less than the KV cache holds, got {prompt_len}; "
                "raise num_kv_blocks",
                "prompt",
            )
        max_tokens = resolve_max_tokens(params, prompt_len, self.model.max_model_len)
        if params.max_tokens is not None and prompt_len + max_tokens > room:
            raise SamplingParamsError(
                f"prompt and answer must fit the {room} tokens of the KV cache, got {prompt_len} + {max_tokens}; "
                "lower max_tokens, or raise num_kv_blocks",
                "max_tokens",
            )

    def submit(self, group: RequestGroup) -> None:
        """Queues a prepared request. Changes nothing if it raises."""
        try:
            for sequence in group.sequences:
                self.scheduler.add_request(sequence.request)
                self._sequences[sequence.request.request_id] = sequence
        except BaseException:
            for sequence in group.sequences:
                if self._sequences.pop(sequence.request.request_id, None) is sequence:
                    self.scheduler.abort_request(sequence.request.request_id)
            raise
        self._groups[group.request_id] = group

    def refuse(self, group: RequestGroup, error: BaseException) -> RequestOutput:
        """The output of a request that `submit` has not accepted."""
        return self._ended(group, reason_of(error))

    def abort(self, group_id: str, reason: str = "aborted by the caller") -> RequestOutput | None:
        """Ends a request in any state and returns its output so far; None if the id is unknown.

        The reason becomes the `stop_reason` of its unfinished answers.
        """
        group = self._groups.pop(group_id, None)
        if group is None:
            return None
        for sequence in group.sequences:
            self.scheduler.abort_request(sequence.request.request_id)
            self._sequences.pop(sequence.request.request_id, None)
        return self._ended(group, reason)

    def _ended(self, group: RequestGroup, reason: str) -> RequestOutput:
        group.metrics.record_finish(time.monotonic())
        for sequence in group.sequences:
            sequence.abort(reason)
        return group.output()

    def reset(self, error: BaseException) -> EngineError:
        """Drops all requests and starts with an empty scheduler, after a step that has raised; returns what to report.

        Needed only for errors outside of any request, such as a full disk of a swap tier: the step may be half done.
        """
        LOG.error("a step failed; its %d requests have ended", len(self._groups), exc_info=error)
        self._groups.clear()
        self._sequences.clear()
        self._failed.clear()
        try:
            self._tiers.wait()  # a copy in the background must not write to blocks that new requests get
        except Exception:
            LOG.error("a copy to a swap tier failed", exc_info=True)
        self.scheduler = self._make_scheduler()
        failure = EngineError(
            f"a step of the engine failed, and its requests have ended: {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        return failure

    def step(self, *, only_finished: bool = False) -> list[RequestOutput]:
        """Plans and runs one step; returns the requests with new tokens or an end, in order of arrival.

        `only_finished` leaves out requests that continue, which saves building their outputs.
        """
        plan = self.scheduler.schedule()
        self._copy_blocks(plan)
        self._record_hits(plan)
        changed: list[Sequence] = []
        for part in self._worker_steps(plan):
            changed += self._run(part)
        if self._failed:
            changed += self._failed
            self._failed = []
        # The copies out to a tier ran concurrently with the batches. They must be complete before the commit, which
        # frees their source blocks.
        self._tiers.wait()
        self.num_steps += 1
        changed += self._update([s.request.request_id for s in changed if s.is_finished])
        return self._collect([s for s in changed if s.is_finished] if only_finished else changed, only_finished)

    def _copy_blocks(self, plan: ScheduleOutput) -> None:
        """Copies KV blocks before the batches run.

        The source of a fork is the partial last block of its parent, which the parent's decode in this step writes to.
        Copies into the device pool are complete on return, as this step decodes them; copies out to a tier continue in
        the background.
        """
        if plan.block_copies:
            self._tiers.copy_blocks(plan.block_copies)
        if plan.tier_copies:
            self._tiers.start(plan.tier_copies)
        if plan.kv_migrations:
            self._migrator.run(plan.kv_migrations)

    def _record_hits(self, plan: ScheduleOutput) -> None:
        """Records the prompt's hits in the prefix cache; hits of a replay on its own KV do not count."""
        for request_id, num_tokens in plan.num_cached_tokens.items():
            sequence = self._sequences[request_id]
            if sequence.index == 0 and not sequence.request.num_preemptions:
                sequence.group.num_cached_tokens = num_tokens

    def _worker_steps(self, plan: ScheduleOutput) -> list[WorkerStep]:
        """Assigns the batches to workers; on one worker decodes and chunks are one hybrid step, decodes first."""
        decodes, prefills = plan.decode_batch, plan.prefill_batch.chunks if plan.prefill_batch else []
        if decodes and prefills and not self.is_strict:
            return [WorkerStep(self.decoder, "hybrid", decodes, prefills)]
        steps = []
        if decodes:
            steps.append(WorkerStep(self.decoder, "decode", decodes, []))
        if prefills:
            steps.append(WorkerStep(self.prefiller, "prefill", None, prefills))
        return steps

    def _run(self, part: WorkerStep) -> list[Sequence]:
        """Computes a batch, appends the new tokens, and returns the sequences that got one.

        These are the decodes and, for each chunk that completes its prompt, the request and its forks.
        """
        sequences = [] if part.decodes is None else [self._sequences[r.request_id] for r in part.decodes.requests]
        rows = list(range(len(sequences)))
        ends = list(itertools.accumulate((chunk.num_tokens for chunk in part.chunks), initial=len(rows)))[1:]
        for chunk, end in zip(part.chunks, ends, strict=True):
            if chunk.is_last:
                for request in (chunk.request, *self.scheduler.forks_of(chunk.request.request_id)):
                    sequences.append(self._sequences[request.request_id])
                    rows.append(end - 1)
        scored = self._add_prompt_rows(part.chunks, ends, rows)
        try:
            result = part.worker.run(part.stage, part.decodes, part.chunks, rows)
        except Exception as error:
            return self._run_one_by_one(part, error)
        for group, positions, span in scored:
            try:
                group.score_prompt(positions, result.logits[span], self._token_text)
            except BaseException as error:
                self._fail(group, error)
        if sequences:
            self._sample(sequences, result)
        return sequences

    def _run_one_by_one(self, part: WorkerStep, error: Exception) -> list[Sequence]:
        """Computes the requests of a failed batch alone, so that only those that fail again end.

        Nothing was sampled yet, and computing a token twice writes the same KV to the same slots.
        """
        alone = [WorkerStep(part.worker, "prefill", None, [chunk]) for chunk in part.chunks]
        for chunk in part.decodes.chunks if part.decodes else ():
            batch = DecodeStepBatch(0, [chunk.request], [chunk.start], 0)
            alone.append(WorkerStep(part.worker, "decode", batch, []))
        requests = [*(chunk.request for chunk in part.chunks), *(part.decodes.requests if part.decodes else ())]
        if len(alone) == 1:
            self._fail(self._sequences[requests[0].request_id].group, error)
            return []
        LOG.warning("a step of %d requests failed; each runs alone", len(alone), exc_info=error)
        sequences = []
        for request, step in zip(requests, alone, strict=True):
            if not self._sequences[request.request_id].is_finished:
                sequences += self._run(step)
        return sequences

    def _fail(self, group: RequestGroup, error: BaseException) -> None:
        """Ends a request in the middle of a step, because of an error that belongs to it alone."""
        reraise_unless_attributable(error)
        reason = reason_of(error)
        log_end(group.request_id, reason, error)
        for sequence in group.sequences:
            self.scheduler.abort_request(sequence.request.request_id)
            sequence.abort(reason)
        self._failed += group.sequences

    def _add_prompt_rows(self, chunks: list[Chunk], ends: list[int], rows: list[int]) -> list[PromptRows]:
        """Appends to `rows` the token rows that `prompt_logprobs` requires, and returns the request of each span."""
        scored = []
        for chunk, end in zip(chunks, ends, strict=True):
            group = self._sequences[chunk.request.request_id].group
            if positions := group.rows_to_score(chunk):
                scored.append(PromptRows(group, positions, slice(len(rows), len(rows) + len(positions))))
                rows += [end - chunk.num_tokens + position - chunk.start for position in positions]
        return scored

    def _sample(self, sequences: list[Sequence], result: StepResult) -> None:
        """Samples and appends a token for every sequence; sequence i has row i of the logits."""
        try:
            sampled = _sample_rows(sequences, result)
        except Exception as error:
            if len(sequences) == 1:
                self._fail(sequences[0].group, error)
                return
            for row, sequence in enumerate(sequences):  # the draw of a row does not depend on the other rows
                self._sample([sequence], StepResult(result.logits[row : row + 1], result.tokens[row : row + 1]))
            return
        now = time.monotonic()
        for row, (sequence, token_id) in enumerate(zip(sequences, sampled.token_ids.tolist(), strict=True)):
            if sequence.is_finished:  # its request has failed in this step
                continue
            if row in sampled.failed:  # logits that are not finite end this sequence, and no other one
                self._end_early(sequence, NOT_FINITE)
                continue
            try:
                sequence.append(token_id, self._logprobs(sequence, row, sampled) if sampled.logprobs else None)
            except BaseException as error:
                self._fail(sequence.group, error)
                continue
            sequence.group.metrics.record_token(now)

    def _end_early(self, sequence: Sequence, reason: str) -> None:
        log_end(sequence.group.request_id, reason)
        sequence.abort(reason)

    def _logprobs(self, sequence: Sequence, row: int, sampled: SampledTokens) -> dict[int, Logprob] | None:
        scored, num_top = sampled.logprobs.get(row), sequence.sampling.params.logprobs
        if scored is None or num_top is None:
            return None
        return scored.as_dict(0, num_top, partial(self._token_text, before=sequence.last_token_ids))

    def _update(self, finished_ids: list[str]) -> list[Sequence]:
        """Commits the step; returns the sequences that the scheduler had to end because the KV pool is full."""
        ended = []
        for request_id in self.scheduler.update_after_step(finished_ids):
            sequence = self._sequences[request_id]
            room = self.scheduler.limits.max_kv_tokens
            self._end_early(sequence, f"the KV cache of {room} tokens is full; raise num_kv_blocks")
            ended.append(sequence)
        return ended

    def _collect(self, changed: list[Sequence], only_finished: bool) -> list[RequestOutput]:
        groups = {sequence.group.request_id: sequence.group for sequence in changed}
        outputs = []
        for group in groups.values():
            if group.is_finished:
                self._remove(group)
            if group.is_finished or (group.is_streamed and not only_finished):
                outputs.append(self._output(group))
        return outputs

    def _output(self, group: RequestGroup) -> RequestOutput:
        try:
            return group.output()
        except BaseException as error:  # text is decoded when it is read
            reraise_unless_attributable(error)
            if group.request_id in self._groups:
                log_end(group.request_id, reason_of(error), error)
                self.abort(group.request_id, reason_of(error))
            return group.output()

    def _remove(self, group: RequestGroup) -> None:
        group.metrics.record_finish(time.monotonic())
        del self._groups[group.request_id]
        for sequence in group.sequences:
            del self._sequences[sequence.request.request_id]

    def _token_text(self, token_id: int, before: PySequence[int]) -> str:
        return self.tokenizer.token_text(token_id, before) if self.tokenizer else ""


def _sample_rows(sequences: list[Sequence], result: StepResult) -> SampledTokens:
    """Samples a token for every sequence; sequence i has row i of the logits."""
    logits = result.logits[: len(sequences)]
    if all(sequence.sampling.is_plain_greedy for sequence in sequences):
        return _greedy(logits, result.tokens[: len(sequences)])
    return sample(logits, SamplingBatch([s.sampling for s in sequences], logits.device))


def _greedy(logits_BV: Tensor, token_ids_B: Tensor) -> SampledTokens:
    """The graph's argmax in the sampler's form; rows without a finite maximum have failed."""
    best = logits_BV.gather(1, token_ids_B[:, None]).flatten().isfinite()
    failed = () if best.all() else tuple((~best).nonzero().flatten().tolist())
    return SampledTokens(token_ids_B, {}, failed)


def make_chooser(compiler: ModelCompiler, device: str, objective: ServiceObjective | None) -> ForecastChooser:
    """The chooser of mode `auto`, which forecasts with the roofline of the device."""
    hardware = HARDWARE["h100" if device == "cuda" else "cpu"]
    cost = RooflineStepCost(compiler.layout, compiler.config, hardware, dtype=compiler.dtype)
    return ForecastChooser(cost, objective or ServiceObjective())
