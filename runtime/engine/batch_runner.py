"""Runs the batches of a step on the workers, samples, and appends the new tokens to their sequences.

An error that belongs to one request ends that request alone: a failed batch runs again one request at a time.
"""

import itertools
import time
from collections.abc import Mapping
from collections.abc import Sequence as PySequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.engine.faults import LOG, NOT_FINITE, log_end, reason_of, reraise_unless_attributable
from sageLLM.runtime.engine.outputs import Logprob
from sageLLM.runtime.engine.sampler import SampledTokens, SamplingBatch, sample
from sageLLM.runtime.engine.sequences import RequestGroup, Sequence
from sageLLM.runtime.engine.worker import StepResult, Worker
from sageLLM.runtime.scheduler.base import Batch, Chunk, ScheduleOutput
from sageLLM.runtime.scheduler.batch import DecodeStepBatch
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
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


class BatchRunner:
    """Computes the plans of one scheduler on its workers. `sequences` are the engine's live ones, by request id.

    The prefill worker is the decode worker, unless each role has its own.
    """

    def __init__(
        self,
        decoder: Worker,
        prefiller: Worker,
        scheduler: PDScheduler,
        sequences: Mapping[str, Sequence],
        tokenizer: Tokenizer | None,
    ) -> None:
        self._decoder, self._prefiller = decoder, prefiller
        self._scheduler = scheduler
        self._sequences = sequences
        self._tokenizer = tokenizer
        self._failed: list[Sequence] = []

    def run(self, plan: ScheduleOutput) -> list[Sequence]:
        """Computes a step; returns the sequences with a new token, and those of requests that have failed.

        Sequences with a new token are the decodes and, for each chunk that completes its prompt, the request and its
        forks.
        """
        changed: list[Sequence] = []
        for part in self._worker_steps(plan):
            changed += self._run(part)
        changed += self._failed
        self._failed = []
        return changed

    def _worker_steps(self, plan: ScheduleOutput) -> list[WorkerStep]:
        """Assigns the batches to workers; on one worker decodes and chunks are one hybrid step, decodes first."""
        decodes, prefills = plan.decode_batch, plan.prefill_batch.chunks if plan.prefill_batch else []
        if decodes and prefills and self._decoder is self._prefiller:
            return [WorkerStep(self._decoder, "hybrid", decodes, prefills)]
        steps = []
        if decodes:
            steps.append(WorkerStep(self._decoder, "decode", decodes, []))
        if prefills:
            steps.append(WorkerStep(self._prefiller, "prefill", None, prefills))
        return steps

    def _run(self, part: WorkerStep) -> list[Sequence]:
        """Computes the part of one worker, appends the new tokens, and returns the sequences that got one."""
        sequences = [] if part.decodes is None else [self._sequences[r.request_id] for r in part.decodes.requests]
        rows = list(range(len(sequences)))
        ends = list(itertools.accumulate((chunk.num_tokens for chunk in part.chunks), initial=len(rows)))[1:]
        for chunk, end in zip(part.chunks, ends, strict=True):
            if chunk.is_last:
                for request in (chunk.request, *self._scheduler.forks_of(chunk.request.request_id)):
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
            self._scheduler.abort_request(sequence.request.request_id)
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
                sequence.end_early(NOT_FINITE)
                continue
            try:
                sequence.append(token_id, self._logprobs(sequence, row, sampled) if sampled.logprobs else None)
            except BaseException as error:
                self._fail(sequence.group, error)
                continue
            sequence.group.metrics.record_token(now)

    def _logprobs(self, sequence: Sequence, row: int, sampled: SampledTokens) -> dict[int, Logprob] | None:
        scored, num_top = sampled.logprobs.get(row), sequence.sampling.params.logprobs
        if scored is None or num_top is None:
            return None
        return scored.as_dict(0, num_top, partial(self._token_text, before=sequence.last_token_ids))

    def _token_text(self, token_id: int, before: PySequence[int]) -> str:
        return self._tokenizer.token_text(token_id, before) if self._tokenizer else ""


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
