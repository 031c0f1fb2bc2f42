"""Steps of one worker of a group, which do not wait for those of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sageLLM.runtime.engine.answer_rows import Progress
from sageLLM.runtime.engine.pipeline import StepInFlight, StepPipeline
from sageLLM.runtime.engine.sequences import Sequence as Answer
from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.worker.executor import StepResults
from sageLLM.runtime.worker.orders import GroupOrder
from sageLLM.runtime.worker.process_executor import ProcessExecutor


class RolePipeline(StepPipeline):
    """The steps of one worker of the group."""

    def __init__(
        self,
        scheduler: PDScheduler,
        executor: ProcessExecutor,
        sequences: Mapping[str, Answer],
        tokenizer: Tokenizer | None,
        *,
        plans_ahead: bool,
        on_lost: Callable[[str], None],
        on_submitted: Callable[[StepInFlight], None],
        on_chunks: Callable[[Sequence[Chunk], int], None],
    ) -> None:
        """`on_chunks` is called before an order with chunks is submitted, with the number of the order, from 1."""
        super().__init__(scheduler, executor, sequences, tokenizer, plans_ahead=plans_ahead)
        self._on_lost, self._on_submitted, self._on_chunks = on_lost, on_submitted, on_chunks
        self._num_orders = 0

    def plan(self) -> StepResults | None:
        while len(self._in_flight) < self._max_in_flight and self._scheduler.can_plan:
            step = self._start()
            self._in_flight.append(step)
            if step.results is None:
                break
            self._on_submitted(step)
        return self._in_flight[0].results if self._in_flight else None

    def _submit(self, order: GroupOrder, chunks: Sequence[Chunk]) -> StepResults:
        self._num_orders += 1
        if chunks:
            self._on_chunks(chunks, self._num_orders)
        return super()._submit(order, chunks)

    @property
    def is_empty(self) -> bool:
        """Whether the oldest step computes nothing."""
        return bool(self._in_flight) and self._in_flight[0].results is None

    def finish_done(self) -> Progress:
        """Applies the steps that are complete."""
        progress = Progress([], [])
        while self._in_flight and self._is_done(self._in_flight[0].results):
            changed, ended = self._finish_oldest()
            progress.changed.extend(changed)
            progress.ended.extend(ended)
        return progress

    @staticmethod
    def _is_done(results: StepResults | None) -> bool:
        return results is None or bool(getattr(results, "done", lambda: True)())

    def _replace_workers(self, reason: str) -> None:
        self._on_lost(reason)

    def abandon(self) -> None:
        """Forgets the steps in flight of a worker that is lost."""
        self._in_flight.clear()
        self._num_orders = 0
        self._make_builders()
