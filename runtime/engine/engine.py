"""The engine: continuous batching as a loop of schedule, run, sample, update.

Under `strict` there are two workers, each with its own KV pool; a prefilled request's blocks are copied between them.
"""

import itertools
import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.engine.block_copies import Migrator, TieredPool
from sageLLM.runtime.engine.kv_pool import KVPool
from sageLLM.runtime.engine.outputs import Logprob, RequestMetrics, RequestOutput
from sageLLM.runtime.engine.requests import resolve_max_tokens, stop_rules, validate_params, validate_prompt
from sageLLM.runtime.engine.sampler import SampledTokens, SamplingBatch, SequenceSampling, sample
from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.engine.sequences import RequestGroup, Sequence
from sageLLM.runtime.engine.worker import StepResult, Worker
from sageLLM.runtime.errors import PromptError
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.executor.pipeline import Pipeline
from sageLLM.runtime.kv.copies import KVStats, Tier
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.auto import ForecastChooser
from sageLLM.runtime.scheduler.base import Batch, Chunk, KVBudget, Request, ScheduleOutput
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.text.stop import SequenceText
from sageLLM.runtime.text.tokenizer import Tokenizer


class Run(NamedTuple):
    """What one worker computes in a step: a token of each of the decodes, and the chunks of prompts."""

    worker: Worker
    stage: Stage
    decodes: Batch | None
    chunks: list[Chunk]


class Score(NamedTuple):
    """Rows of logits that tell what the model expected after these positions of a prompt."""

    group: RequestGroup
    positions: list[int]
    rows: slice


class Engine:
    """Serves requests on one model. `step()` advances all of them and returns those that changed."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        pipeline: Pipeline,
        config: PDSchedulerConfig,
        budget: KVBudget,
        disk_folder: Path | None = None,
        objective: ServiceObjective | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.is_strict = config.mode == "strict"
        self.scheduler = PDScheduler(
            config,
            kv_budget=budget,
            max_model_len=model.max_model_len,
            clock=time.monotonic,
            mode_chooser=make_chooser(pipeline, model.device.type, objective) if config.mode == "auto" else None,
        )
        self.decoder = Worker(model, make_pool(model, budget.num_blocks, budget.block_size), pipeline)
        self.prefiller = self.decoder
        if self.is_strict:
            blocks = budget.num_prefill_blocks or budget.num_blocks
            self.prefiller = Worker(model, make_pool(model, blocks, budget.block_size), pipeline)
            graph = pipeline.migrate_graph()
            self._migrator = Migrator(self.prefiller.pool, self.decoder.pool, graph, pipeline)
        tier_sizes: dict[Tier, int] = {"host": budget.num_host_blocks, "disk": budget.num_disk_blocks}
        self._tiers = TieredPool(self.decoder.pool, tier_sizes, pipeline, disk_folder)
        self.num_steps = 0
        self._groups: dict[str, RequestGroup] = {}
        self._sequences: dict[str, Sequence] = {}

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
        """Lets no request find what was computed before, say to measure without it."""
        self.scheduler.kv.prefill.reset_prefix_cache()

    def add(self, group_id: str, prompt: str | None, token_ids: list[int], params: SamplingParams) -> None:
        """Queues a request. Raises RequestError, and changes nothing, for one that cannot be served."""
        group = self._make_group(group_id, prompt, token_ids, params)
        for sequence in group.sequences:
            self.scheduler.add_request(sequence.request)
            self._sequences[sequence.request.request_id] = sequence
        self._groups[group_id] = group

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        """Raises RequestError if the request could not be served."""
        validate_prompt(token_ids, self.model.config.V, self.model.max_model_len)
        validate_params(params, self.model.config.V)
        room = self.scheduler.limits.max_kv_tokens
        if room is not None and len(token_ids) >= room:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens; the KV cache holds {room}, of which one is for a new token; "
                "raise num_kv_blocks",
                "prompt",
            )

    def abort(self, group_id: str) -> RequestOutput | None:
        """Ends a request in whatever state it is; None if there is no such request."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return None
        for sequence in group.sequences:
            self.scheduler.abort_request(sequence.request.request_id)
            self._sequences.pop(sequence.request.request_id, None)
            sequence.text.abort()
        return group.output()

    def step(self, *, only_finished: bool = False) -> list[RequestOutput]:
        """Plans and runs one step; returns the requests with new tokens or an end, in order of arrival.

        With `only_finished` those that go on are left out, which saves the work of showing them.
        """
        plan = self.scheduler.schedule()
        self._copy(plan)
        self._note_hits(plan)
        changed: list[Sequence] = []
        for run in self._runs(plan):
            changed += self._run(run)
        self._tiers.wait()
        self.num_steps += 1
        changed += self._update([s.request.request_id for s in changed if s.is_finished])
        return self._collect([s for s in changed if s.is_finished] if only_finished else changed, only_finished)

    def _copy(self, plan: ScheduleOutput) -> None:
        """Makes the step's copies; those out to a tier go on beside its batches."""
        if plan.block_copies:
            self._tiers.copy_blocks(plan.block_copies)
        if plan.tier_copies:
            self._tiers.start(plan.tier_copies)
        if plan.kv_migrations:
            self._migrator.run(plan.kv_migrations)

    def _note_hits(self, plan: ScheduleOutput) -> None:
        """Notes what an answer's prompt found in the prefix cache; a replay that finds its own KV does not count."""
        for request_id, num_tokens in plan.num_cached_tokens.items():
            sequence = self._sequences[request_id]
            if sequence.index == 0 and not sequence.request.num_preemptions:
                sequence.group.num_cached_tokens = num_tokens

    def _runs(self, plan: ScheduleOutput) -> list[Run]:
        """Which worker computes what in this step; in one step of one worker the decodes come first."""
        decodes, prefills = plan.decode_batch, plan.prefill_batch.chunks if plan.prefill_batch else []
        if decodes and prefills and not self.is_strict:
            return [Run(self.decoder, "hybrid", decodes, prefills)]
        runs = []
        if decodes:
            runs.append(Run(self.decoder, "decode", decodes, []))
        if prefills:
            runs.append(Run(self.prefiller, "prefill", None, prefills))
        return runs

    def _run(self, run: Run) -> list[Sequence]:
        """Computes a batch, chooses a token for each sequence whose last token is in it and for its forks, and returns
        those sequences.
        """
        sequences = [] if run.decodes is None else [self._sequences[r.request_id] for r in run.decodes.requests]
        rows = list(range(len(sequences)))
        ends = list(itertools.accumulate((chunk.num_tokens for chunk in run.chunks), initial=len(rows)))[1:]
        for chunk, end in zip(run.chunks, ends, strict=True):
            if chunk.is_last:
                for request in (chunk.request, *self.scheduler.forks_of(chunk.request.request_id)):
                    sequences.append(self._sequences[request.request_id])
                    rows.append(end - 1)
        scores = self._rows_to_score(run.chunks, ends, rows)
        result = run.worker.run(run.stage, run.decodes, run.chunks, rows)
        for group, positions, span in scores:
            group.score_prompt(positions, result.logits[span], self._token_text)
        if sequences:
            self._choose(sequences, result)
        return sequences

    def _rows_to_score(self, chunks: list[Chunk], ends: list[int], rows: list[int]) -> list[Score]:
        """Adds the rows whose logits `prompt_logprobs` wants, and says whose they are."""
        scores = []
        for chunk, end in zip(chunks, ends, strict=True):
            group = self._sequences[chunk.request.request_id].group
            if positions := group.rows_to_score(chunk):
                scores.append(Score(group, positions, slice(len(rows), len(rows) + len(positions))))
                rows += [end - chunk.num_tokens + position - chunk.start for position in positions]
        return scores

    def _choose(self, sequences: list[Sequence], result: StepResult) -> None:
        """Gives every sequence its token; sequence i has row i of the logits."""
        logits = result.logits[: len(sequences)]
        if all(sequence.sampling.is_plain_greedy for sequence in sequences):
            sampled = _greedy(logits, result.tokens[: len(sequences)])
        else:
            sampled = sample(logits, SamplingBatch([s.sampling for s in sequences], logits.device))
        now = time.monotonic()
        for row, (sequence, token_id) in enumerate(zip(sequences, sampled.token_ids.tolist(), strict=True)):
            if row in sampled.failed:  # its logits are not finite: it is ended, and nobody else is
                sequence.text.abort()
                continue
            sequence.append(token_id, self._logprobs(sequence, row, sampled) if sampled.logprobs else None)
            sequence.group.metrics.record_token(now)

    def _logprobs(self, sequence: Sequence, row: int, sampled: SampledTokens) -> dict[int, Logprob] | None:
        scored, num_top = sampled.logprobs.get(row), sequence.sampling.params.logprobs
        return scored.as_dict(0, num_top, self._token_text) if scored and num_top is not None else None

    def _update(self, finished_ids: list[str]) -> list[Sequence]:
        """Commits the step; returns the sequences that the scheduler had to end for want of room."""
        ended = []
        for request_id in self.scheduler.update_after_step(finished_ids):
            sequence = self._sequences[request_id]
            sequence.text.abort()
            ended.append(sequence)
        return ended

    def _collect(self, changed: list[Sequence], only_finished: bool) -> list[RequestOutput]:
        groups = {sequence.group.request_id: sequence.group for sequence in changed}
        outputs = []
        for group in groups.values():
            if group.is_finished:
                self._remove(group)
            if group.is_finished or not only_finished:
                outputs.append(group.output())
        return outputs

    def _remove(self, group: RequestGroup) -> None:
        group.metrics.record_finish(time.monotonic())
        del self._groups[group.request_id]
        for sequence in group.sequences:
            del self._sequences[sequence.request.request_id]

    def _make_group(
        self, group_id: str, prompt: str | None, token_ids: list[int], params: SamplingParams
    ) -> RequestGroup:
        self.check(token_ids, params)
        metrics = RequestMetrics(arrival_time=time.monotonic())
        group = RequestGroup(group_id, prompt, tuple(token_ids), params, metrics)
        eos_ids = self.tokenizer.eos_token_ids if self.tokenizer else frozenset[int]()
        rules = stop_rules(params, eos_ids, len(token_ids), self.model.max_model_len)
        first: Request | None = None
        for index in range(params.n):
            request = Request(
                request_id=f"{group_id}/{index}",
                prompt_token_ids=token_ids,
                max_new_tokens=resolve_max_tokens(params, len(token_ids), self.model.max_model_len),
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k or -1,
                arrival_time=metrics.arrival_time,
                # What scores the prompt must compute all of it: it shares nothing with others.
                salt=f"prompt_logprobs {group_id}" if index == 0 and params.prompt_logprobs is not None else "",
                fork_of=first,
            )
            first = first or request
            sampling = SequenceSampling(
                params, token_ids, request.output_token_ids, rules.banned_before_min_tokens, index
            )
            text = SequenceText(self.tokenizer, rules, params.skip_special_tokens)
            group.sequences.append(Sequence(index, group, request, sampling, text))
        return group

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id) if self.tokenizer else ""


def _greedy(logits_BV: Tensor, token_ids_B: Tensor) -> SampledTokens:
    """The graph's own choice as the sampler would give it: rows whose best logit is not finite have failed."""
    best = logits_BV.gather(1, token_ids_B[:, None]).flatten().isfinite()
    failed = () if best.all() else tuple((~best).nonzero().flatten().tolist())
    return SampledTokens(token_ids_B, {}, failed)


def make_chooser(pipeline: Pipeline, device: str, objective: ServiceObjective | None) -> ForecastChooser:
    """What decides in mode `auto`: forecasts with the roofline of the device."""
    hardware = HARDWARE["h100" if device == "cuda" else "cpu"]
    cost = RooflineStepCost(pipeline.layout, pipeline.config, hardware, dtype=pipeline.dtype)
    return ForecastChooser(cost, objective or ServiceObjective())


def make_pool(model: Model, num_blocks: int, block_size: int) -> KVPool:
    """An empty KV pool of the shape that the model's layout keeps, on the model's device."""
    shape = model.layout.cache(model.config)
    return KVPool(model.config.L, num_blocks, block_size, shape, model.dtype, model.device)
