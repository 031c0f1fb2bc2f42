"""Steps in flight: planned by the scheduler, run by the executor, and applied to the sequences in order.

While a step runs, the next one is planned and submitted, so that a worker goes from one to the other without waiting.
A sequence that ends with a step may be part of the next one already; its token there is ignored.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from sageLLM.runtime.engine.answer_rows import AnswerRows, Progress
from sageLLM.runtime.engine.order_builder import OrderBuilder, OrderedStep
from sageLLM.runtime.engine.sequences import RequestGroup
from sageLLM.runtime.engine.sequences import Sequence as Answer
from sageLLM.runtime.sampling.logprobs import Logprob, ScoredTokens
from sageLLM.runtime.scheduler.base import ScheduleOutput
from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.worker.executor import Executor, StepResults, WorkersLostError
from sageLLM.runtime.worker.faults import LOG, NOT_FINITE, log_end, reason_of, reraise_unless_attributable
from sageLLM.runtime.worker.orders import GroupOrder, StepResult

MAX_PROMOTED_BLOCKS = 32
"""The KV blocks that a step moves from the tier below to the device, before its computation."""
MAX_LOSSES = 3
"""A request ends when the workers are lost this many times with the same token to compute."""


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A planned step: the parts of its workers, and their results; None if it has nothing to run."""

    parts: list[OrderedStep]
    results: StepResults | None


class StepPipeline:
    """The steps of one scheduler. `sequences` are the engine's live ones, by request id.

    One step is in flight for each of `num_stages` pipeline stages, and one more if `plans_ahead`.
    """

    def __init__(
        self,
        scheduler: PDScheduler,
        executor: Executor,
        sequences: Mapping[str, Answer],
        tokenizer: Tokenizer | None,
        *,
        plans_ahead: bool,
        num_stages: int = 1,
    ) -> None:
        self._scheduler, self._executor = scheduler, executor
        self._sequences, self._tokenizer = sequences, tokenizer
        self._max_in_flight = num_stages + plans_ahead
        self._in_flight: deque[StepInFlight] = deque()
        self._losses: dict[str, tuple[int, int]] = {}
        self._rows: AnswerRows | None = None
        self._has_lower_tier = scheduler.kv.decode.has_lower_tier
        self.abort_request: Callable[[str], bool] = scheduler.abort_request
        self._make_builders()

    def _make_builders(self) -> None:
        """Builders for workers that have nothing yet."""
        self._decode_orders = OrderBuilder(self._sequences, self._scheduler)
        # Outside strict mode one worker has both roles, and one builder knows what it has.
        is_split = self._scheduler.kv.is_split
        self._prefill_orders = OrderBuilder(self._sequences, self._scheduler) if is_split else self._decode_orders

    @property
    def is_split(self) -> bool:
        return self._prefill_orders is not self._decode_orders

    @property
    def has_steps(self) -> bool:
        """Whether a step is in flight."""
        return bool(self._in_flight)

    def advance(self) -> Progress:
        """Completes the oldest step, or a new one; returns the sequences that got a token or ended, in order.

        If the workers are lost, new ones are started, and all requests are replayed from their prompts and tokens.
        """
        self.plan()
        return self._finish_oldest()

    def plan(self) -> StepResults | None:
        """Plans and submits as many steps as can be in flight; returns the results of the oldest one, if it has any."""
        while len(self._in_flight) < self._max_in_flight:
            self._in_flight.append(self._start())
        return self._in_flight[0].results

    def settle(self) -> None:
        """Completes the steps in flight. Only for an engine without requests: what they return is ignored."""
        while self._in_flight:
            self._finish_oldest()

    def forget(self, request_id: str) -> None:
        """Lets the workers drop a sequence with their next order."""
        self._rows = None
        self._decode_orders.forget(request_id)
        self._prefill_orders.forget(request_id)

    # --- planning ---

    def _start(self) -> StepInFlight:
        plan = self._scheduler.plan_ahead()
        if self._has_lower_tier:
            for request_id in self._scheduler.promote_kv(plan, MAX_PROMOTED_BLOCKS):
                self._decode_orders.send_again(request_id)
        self._record_hits(plan)
        for request in (*plan.preempted_requests, *plan.requeued_requests):
            if self.is_split:  # it is prefilled again on one worker, and the other has the newest tokens
                self.forget(request.request_id)
            else:
                self._decode_orders.send_again(request.request_id)
        decodes, chunks = plan.decode_batch, plan.prefill_batch.chunks if plan.prefill_batch else []
        has_copies = bool(plan.block_copies or plan.tier_copies)
        decode = prefill = None
        if not self.is_split:
            if decodes or chunks or has_copies:
                decode = self._decode_orders.build(plan, decodes, chunks, has_tiers=True)
        else:
            if decodes or has_copies:
                decode = self._decode_orders.build(plan, decodes, [], has_tiers=True)
                for request in decodes.requests if decodes else ():
                    self._prefill_orders.forget(request.request_id)
            if chunks:
                prefill = self._prefill_orders.build(plan, None, chunks, has_tiers=False)
        parts = [part for part in (decode, prefill) if part is not None]
        if not parts and not plan.kv_migrations:
            return StepInFlight([], None)
        order = GroupOrder(
            None if decode is None else decode.order, None if prefill is None else prefill.order, plan.kv_migrations
        )
        return StepInFlight(parts, self._submit(order, chunks))

    def _submit(self, order: GroupOrder, chunks: Sequence[Chunk]) -> StepResults:
        return self._executor.submit(order)

    def _record_hits(self, plan: ScheduleOutput) -> None:
        """Records the prompt's hits in the prefix cache; hits of a replay on its own KV do not count."""
        for request_id, num_tokens in plan.num_cached_tokens.items():
            sequence = self._sequences[request_id]
            if sequence.index == 0 and not sequence.request.num_preemptions:
                sequence.group.num_cached_tokens = num_tokens

    # --- results ---

    def _finish_oldest(self) -> Progress:
        """Waits for the oldest step and applies it, or recovers if its workers are lost."""
        step = self._in_flight.popleft()
        try:
            results = [] if step.results is None else step.results.result()
        except WorkersLostError as error:
            ended = self._recover(step, str(error))
            return Progress(ended, ended)
        return self._complete(step, results)

    def _complete(self, step: StepInFlight, results: list[StepResult]) -> Progress:
        changed: list[Answer] = []
        ended: list[Answer] = []
        for part, result in zip(step.parts if results else (), results, strict=True):
            if self._append_all(part, result):
                changed += part.sampled
                continue
            found = self._apply(part, result)
            changed += found
            ended += [sequence for sequence in found if sequence.is_finished]
        full = self._commit([sequence.request.request_id for sequence in ended])
        return Progress(changed + full, ended + full) if full else Progress(changed, ended)

    def _append_all(self, part: OrderedStep, result: StepResult) -> bool:
        """Appends the tokens of decodes of which none ends; False, and no change, if the step is not of this kind."""
        if part.chunked or result.logprobs or result.not_finite or result.failures:
            if part.order.has_decodes:
                self._rows = None  # they get their tokens one by one, and one of them may end
            return False
        rows = self._rows
        if rows is None or rows.answers is not part.sampled:  # the order builder keeps the list of the same decodes
            rows = self._rows = AnswerRows(part.sampled)
        return rows.append(result.token_ids)

    def _apply(self, part: OrderedStep, result: StepResult) -> list[Answer]:
        """Appends the tokens of one worker's result; returns the sequences with a new token or an end."""
        failed: list[Answer] = []
        for scores in result.prompt_scores:
            self._score_prompt(scores.sequence_id, scores.positions, scores.scored, failed)
        for sequence_id, reason in result.failures.items():
            sequence = self._sequences.get(sequence_id)
            if sequence is not None:
                self._fail(sequence.group, reason, failed)
        changed = []
        parents, logprobs, not_finite = part.parents, result.logprobs, result.not_finite
        for row, (sequence, token_id) in enumerate(zip(part.sampled, result.token_ids, strict=True)):
            if sequence.text.finish_reason is not None:  # before this step, or by a failure in it
                continue
            if parents and row in parents and not self._is_fork(sequence, parents[row]):
                # The parent was preempted in the meantime, and the scheduler prefills the fork as any other request.
                self.forget(sequence.request.request_id)
                continue
            changed.append(sequence)
            if not_finite and row in not_finite:
                sequence.end_early(NOT_FINITE)
                continue
            try:
                sequence.append(token_id, self._logprobs(sequence, logprobs.get(row)) if logprobs else None)
            except BaseException as error:
                reraise_unless_attributable(error)
                self._fail(sequence.group, reason_of(error), failed, error)
        if part.chunked:  # the first token of an answer follows the last chunk of a prompt
            now = time.monotonic()
            for sequence in changed:
                if sequence.request.output_token_ids:
                    sequence.group.metrics.record_first_token(now)
        return list({id(sequence): sequence for sequence in (*changed, *failed)}.values()) if failed else changed

    def _is_fork(self, sequence: Answer, parent_id: str) -> bool:
        return sequence.request in self._scheduler.forks_of(parent_id)

    def _score_prompt(self, sequence_id: str, positions: list[int], scored: ScoredTokens, failed: list[Answer]) -> None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.is_finished:
            return
        try:
            sequence.group.score_prompt(positions, scored, self._token_text)
        except BaseException as error:
            reraise_unless_attributable(error)
            self._fail(sequence.group, reason_of(error), failed, error)

    def _fail(self, group: RequestGroup, reason: str, failed: list[Answer], error: BaseException | None = None) -> None:
        """Ends a request in the middle of a step, because of an error that belongs to it alone."""
        if group.is_finished:
            return
        log_end(group.request_id, reason, error)
        self._rows = None
        for sequence in group.sequences:
            self.abort_request(sequence.request.request_id)
            sequence.abort(reason)
        failed += group.sequences

    def _recover(self, step: StepInFlight, reason: str) -> list[Answer]:
        """Starts new workers, and lets the scheduler recompute the KV of all requests.

        A request that was lost several times without a new token in between is ended, as it may be the cause. Returns
        its sequences. Raises EngineError if the workers do not start.
        """
        lost = [sequence for part in step.parts for sequence in part.computed]
        self._in_flight.clear()
        self._replace_workers(reason)
        self._make_builders()
        ended: list[Answer] = []
        for sequence in lost:
            request = sequence.request
            num_tokens, count = self._losses.get(request.request_id, (-1, 0))
            count = count + 1 if num_tokens == request.num_output_tokens else 1
            self._losses[request.request_id] = request.num_output_tokens, count
            if count >= MAX_LOSSES:
                why = f"the workers were lost {count} times while they computed this request: {reason}"
                self._fail(sequence.group, why, ended)
        self._losses = {name: loss for name, loss in self._losses.items() if name in self._sequences}
        return ended

    def _replace_workers(self, reason: str) -> None:
        LOG.error("%s; new workers are started, and %d sequences are replayed", reason, len(self._sequences))
        self._executor.restart()
        self._scheduler.lose_kv()

    def _commit(self, finished_ids: Iterable[str]) -> list[Answer]:
        """Commits the step; returns the sequences that the scheduler had to end because the KV pool is full."""
        ended = []
        for request_id in self._scheduler.update_after_step(finished_ids):
            self._rows = None
            sequence = self._sequences[request_id]
            room = self._scheduler.limits.max_kv_tokens
            sequence.end_early(f"the KV cache of {room} tokens is full; raise num_kv_blocks")
            ended.append(sequence)
        return ended

    def _logprobs(self, sequence: Answer, scored: ScoredTokens | None) -> dict[int, Logprob] | None:
        num_top = sequence.group.params.logprobs
        if scored is None or num_top is None:
            return None
        return scored.as_dict(0, num_top, partial(self._token_text, before=sequence.last_token_ids))

    def _token_text(self, token_id: int, before: Sequence[int]) -> str:
        return self._tokenizer.token_text(token_id, before) if self._tokenizer else ""
