"""A worker: executes step orders on one device, samples, and returns token ids.

An error that belongs to one sequence ends that sequence alone: a failed batch runs again one sequence at a time.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.executor.token_reader import PendingTokens
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.sampling.logprobs import score_prompt
from sageLLM.runtime.sampling.share import Share
from sageLLM.runtime.worker.block_copies import TieredPool
from sageLLM.runtime.worker.faults import LOG, reason_of, reraise_unless_attributable
from sageLLM.runtime.worker.kv_pages import KVPages
from sageLLM.runtime.worker.model_runner import Logits, ModelRunner
from sageLLM.runtime.worker.orders import PromptScores, StepOrder, StepResult
from sageLLM.runtime.worker.recent import Recent
from sageLLM.runtime.worker.row_sampler import RowSampler
from sageLLM.runtime.worker.sequences import (
    NO_DECODES,
    DecodeBatch,
    SequenceChunk,
    SequenceTable,
    WorkerSequence,
)
from sageLLM.runtime.worker.token_masks import TokenMasks
from sageLLM.runtime.worker.token_return import NO_TOKEN, TokenReturn
from sageLLM.runtime.worker.vocab_share import share_of_rank


class Batch(NamedTuple):
    """A batch of a step: sequences that get one token, chunks, and `first_row`, the index of its first new token."""

    decodes: DecodeBatch
    chunks: list[SequenceChunk]
    first_row: int = 0

    @property
    def stage(self) -> Stage:
        if self.decodes and self.chunks:
            return "hybrid"
        return "decode" if self.decodes else "prefill"

    def split(self) -> list["Batch"]:
        """One batch for each sequence, with the same rows."""
        parts = [Batch(DecodeBatch([one]), [], self.first_row + row) for row, one in enumerate(self.decodes)]
        row = self.first_row + len(self.decodes)
        for chunk in self.chunks:
            parts.append(Batch(NO_DECODES, [chunk], row))
            row += len(chunk.samples)
        return parts

    @property
    def sampled(self) -> Sequence[WorkerSequence]:
        """The sequences that get a token, in the order of their rows."""
        if not self.chunks:
            return self.decodes
        return [*self.decodes, *itertools.chain.from_iterable(chunk.samples for chunk in self.chunks)]


class LaunchedStep(NamedTuple):
    """A step of decodes that may still run, and its tokens on their way to the host."""

    sampler: RowSampler
    logits: Logits
    tokens: PendingTokens


class Worker:
    """Executes the orders of one role. It owns the device's KV pool and, for the role that decodes, the tiers."""

    def __init__(
        self,
        runner: ModelRunner,
        tiers: TieredPool | None = None,
        *,
        isolates_failures: bool = True,
        token_return: TokenReturn | None = None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """With `isolates_failures` an error ends the sequence that it belongs to; otherwise it ends the step.

        Ranks of a group must not isolate: each collective needs all of them, so none can run a part of a step alone.
        `token_return` is for a model that is divided into pipeline stages. `grammars` are for structured output.
        """
        self.runner = runner
        self._isolates_failures = isolates_failures
        self._tiers = tiers
        self._pages = KVPages(runner.pool)
        self._masks = None if grammars is None else TokenMasks(grammars)
        self._token_return = token_return
        num_batches = runner.model.pipeline_stage.count
        self._sequences = SequenceTable(num_batches)
        self._failed: set[str] = set()
        # Ranks that share the vocabulary sample together; an error in one of them would leave the others waiting.
        self._share = share_of_rank(runner.model.config) if runner.compiler.samples_locally else None
        self._decode_sampler = RowSampler([], self._share)
        self._decode_rows: list[int] = []
        self._samplers: Recent[Sequence[WorkerSequence], RowSampler] = Recent(num_batches)

    def begin(self, order: StepOrder) -> None:
        """Updates the sequences, and copies KV blocks before the batches run.

        The source of a fork is the partial last block of its parent, which the parent's decode in this step writes to.
        Copies into the device pool are complete on return, as this step decodes them; copies out to a tier continue in
        the background until the end of `run`.
        """
        self._sequences.update(order)
        if order.new and self._masks is not None:
            self._masks.constrain(order.new, self._sequences)
        self._failed.difference_update(order.dropped)
        if order.tables:
            num_used = 1 + max(max(table.block_ids) for table in order.tables)
            self._pages.expect(num_used, self._sequences.num_decodes)
        if order.block_copies and self._tiers is not None:
            self._tiers.copy_blocks(order.block_copies)
        if order.tier_copies and self._tiers is not None:
            self._tiers.start(order.tier_copies)

    def run(self, order: StepOrder) -> StepResult:
        """Computes the tokens of an order that has begun."""
        batch = Batch(
            self._sequences.decodes(order),
            [self._sequences.chunk(chunk) for chunk in order.chunks] if order.chunks else [],
        )
        result = StepResult([NO_TOKEN] * len(batch.sampled))
        if self._failed:
            self._run_one_by_one(batch, result)
        elif batch.decodes or batch.chunks:
            self._run(batch, result)
        if self._tiers is not None:
            # The copies out to a tier must be complete before the engine frees their source blocks.
            self._tiers.wait()
        return result

    def launch(self, order: StepOrder, *, follows: bool) -> "LaunchedStep | None":
        """Starts a step of decodes on a GPU without waiting for it; None for others, which are run.

        If it `follows` a launched step that is not finished, its decodes must be those of that step.
        """
        is_plain = order.has_decodes and order.decodes is None and not (order.dropped or order.new or order.chunks)
        if not is_plain or order.block_copies or order.tier_copies or self._failed:
            return None
        decodes = self._sequences.decodes(order)
        rows, sampler = self._decode_parts(decodes)
        if not sampler.is_on_device or sampler.constraints or not self.runner.can_follow(len(decodes)):
            return None
        self.begin(order)
        draws = sampler.draws(decodes.num_kept + follows)
        try:
            if follows:
                logits: Logits | None = self.runner.run_after(decodes, rows, draws)
            else:
                logits = self.runner.run("decode", decodes, [], rows, draws)
        except Exception:
            self.runner.step_inputs.forget()
            return None
        assert logits is not None and logits.tokens is not None, "a captured step returns tokens"
        return LaunchedStep(sampler, logits, logits.tokens)

    def finish(self, step: "LaunchedStep") -> StepResult:
        """Waits for the tokens of a launched step."""
        result = StepResult([NO_TOKEN] * len(step.sampler.sequences))
        self._sample(step.sampler, 0, step.logits, result)
        return result

    def close(self) -> None:
        self._pages.close()
        if self._masks is not None:
            self._masks.close()

    def reset(self) -> None:
        """Drops all sequences, after a step that has raised."""
        self._sequences.clear()
        self._failed.clear()
        try:
            if self._tiers is not None:
                self._tiers.wait()  # a copy in the background must not write to blocks that new requests get
        except Exception:
            LOG.error("a copy to a swap tier failed", exc_info=True)

    def _run(self, batch: Batch, result: StepResult) -> None:
        rows: Sequence[int]
        if batch.chunks:
            spans, rows = _chunk_rows(batch)
            sampler = RowSampler(batch.sampled, self._share)
        else:
            spans, rows, sampler = [], *self._decode_parts(batch.decodes)
        if self._token_return is not None:
            self._token_return.receive_for(batch.decodes, [chunk.sequence for chunk in batch.chunks])
        if sampler.constraints and self._masks is not None and self.runner.model.pipeline_stage.is_last:
            self._masks.start(sampler.constraints)
        try:
            draws = sampler.draws(batch.decodes.num_kept)
            logits = self.runner.run(batch.stage, batch.decodes, batch.chunks, rows, draws)
        except Exception as error:
            if not self._isolates_failures:
                raise
            self._run_failed(batch, result, error)
            return
        if logits is None:
            assert self._token_return is not None, "a stage without logits must have a TokenReturn"
            self._token_return.expect(batch.sampled)
            return
        # Layouts that scale or cap their logits gather them first: each rank has them all.
        share = None if logits.best is None else self._share
        for chunk, span in spans:
            self._score_prompt(chunk, logits.values[span], share, result)
        if sampler.sequences:
            self._sample(sampler, batch.first_row, logits, result)
            if self._token_return is not None:
                self._token_return.send(result.token_ids)

    def _decode_parts(self, decodes: DecodeBatch) -> tuple[list[int], RowSampler]:
        """The token rows and the sampler of decodes; the same objects as before while `decodes` is the same."""
        if decodes is not self._decode_sampler.sequences:
            sampler = self._samplers.get(decodes)
            if sampler is None:
                sampler = RowSampler(decodes, self._share)
                self._samplers.put(decodes, sampler)
            self._decode_sampler = sampler
            if len(self._decode_rows) != len(decodes):
                self._decode_rows = list(range(len(decodes)))
        return self._decode_rows, self._decode_sampler

    def _run_failed(self, batch: Batch, result: StepResult, error: Exception) -> None:
        """Computes the sequences of a failed batch alone, so that only those that fail again end.

        Nothing was sampled yet, and computing a token twice writes the same KV to the same slots.
        """
        if len(batch.decodes) + len(batch.chunks) == 1:
            sequence = batch.decodes[0] if batch.decodes else batch.chunks[0].sequence
            self._fail(sequence, batch.sampled, result, error)
            return
        LOG.warning(
            "a step of %d sequences failed; each runs alone", len(batch.decodes) + len(batch.chunks), exc_info=error
        )
        self._run_one_by_one(batch, result)

    def _run_one_by_one(self, batch: Batch, result: StepResult) -> None:
        for part in batch.split():
            sequence = part.decodes[0] if part.decodes else part.chunks[0].sequence
            if sequence.sequence_id in self._failed:  # in an earlier step, which the engine did not know of
                _append_nothing(part.sampled)
            else:
                self._run(part, result)
                part.decodes.settle()

    def _fail(
        self, sequence: WorkerSequence, sampled: Sequence[WorkerSequence], result: StepResult, error: BaseException
    ) -> None:
        """Reports an error that belongs to a sequence; `sampled` are those that get no token because of it."""
        reraise_unless_attributable(error)
        LOG.warning("the step of sequence %s failed", sequence.sequence_id, exc_info=error)
        self._failed.add(sequence.sequence_id)
        result.failures[sequence.sequence_id] = reason_of(error)
        _append_nothing(sampled)

    def _score_prompt(self, chunk: SequenceChunk, logits: Tensor, share: Share | None, result: StepResult) -> None:
        sequence = chunk.sequence
        assert sequence.sampling is not None, "only generated sequences are scored"
        try:
            following = [sequence.prompt_token_ids[position + 1] for position in chunk.scored]
            num_top = sequence.sampling.params.prompt_logprobs or 0
            if share is not None:
                logits = logits[:, : share.count]
            scored = score_prompt(logits, following, num_top, share)
            result.prompt_scores.append(PromptScores(sequence.sequence_id, list(chunk.scored), scored))
        except BaseException as error:
            if self._share is not None:
                raise
            self._fail(sequence, (), result, error)

    def _sample(self, sampler: RowSampler, first_row: int, logits: Logits, result: StepResult) -> None:
        """Samples and appends a token for every sequence; sequence i has row i of the logits."""
        sequences = sampler.sequences
        try:
            sampled = sampler.sample(logits)
        except Exception as error:
            if self._share is not None:
                raise
            if len(sequences) == 1:
                self._fail(sequences[0], sequences, result, error)
                return
            for row in range(len(sequences)):  # the draw of a row does not depend on the other rows
                one, alone = sampler.alone(row, logits)
                self._sample(one, first_row + row, alone, result)
            return
        result.token_ids[first_row : first_row + len(sequences)] = sampled.token_ids
        if isinstance(sequences, DecodeBatch):
            sequences.append(sampled.token_ids)
            if not (sampler.is_plain_greedy or (sampler.is_on_device and logits.tokens is not None)):
                sequences.settle()  # the next tokens depend on these
        else:
            for sequence, token_id in zip(sequences, sampled.token_ids, strict=True):
                sequence.output_token_ids.append(token_id)
        for row, scored in sampled.logprobs.items():
            result.logprobs[first_row + row] = scored
        result.not_finite += [first_row + row for row in sampled.failed]


def _append_nothing(sequences: Sequence[WorkerSequence]) -> None:
    """Keeps the lengths of sequences that have failed as the engine expects them, until it drops them."""
    for sequence in sequences:
        sequence.output_token_ids.append(NO_TOKEN)


def _chunk_rows(batch: Batch) -> tuple[list[tuple[SequenceChunk, slice]], list[int]]:
    """The token rows with logits of a batch with chunks, and the spans of them to score prompts with.

    The rows of samples come first, in the order of `Batch.sampled`.
    """
    rows = list(range(len(batch.decodes)))
    ends = list(itertools.accumulate((chunk.num_tokens for chunk in batch.chunks), initial=len(rows)))[1:]
    for chunk, end in zip(batch.chunks, ends, strict=True):
        rows += [end - 1] * len(chunk.samples)
    spans = []
    for chunk, end in zip(batch.chunks, ends, strict=True):
        if chunk.scored:
            spans.append((chunk, slice(len(rows), len(rows) + len(chunk.scored))))
            rows += [end - chunk.num_tokens + position - chunk.start for position in chunk.scored]
    return spans, rows
