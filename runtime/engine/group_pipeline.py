"""Steps of prefill and decode workers, copies of KV between them, and restarts of those that are lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue

from sageLLM.runtime.engine.answer_rows import Progress
from sageLLM.runtime.engine.pd_timeline import Timeline
from sageLLM.runtime.engine.pipeline import StepInFlight
from sageLLM.runtime.engine.role_pipeline import RolePipeline
from sageLLM.runtime.engine.sequences import Sequence as Answer
from sageLLM.runtime.engine.transfer_desk import TransferDesk
from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.disaggregated import DisaggregatedScheduler
from sageLLM.runtime.scheduler.transfer_commands import PieceId, PushPiece
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.transport.base import Report
from sageLLM.runtime.worker.executor import StepResults
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.kv_group import KVGroup
from sageLLM.runtime.worker.process_executor import ProcessExecutor

WAIT_SECONDS = 0.05
"""The engine returns to its callers at least this often while nothing ends."""
PAUSE_SECONDS = 0.002
"""The wait after a step that had nothing to compute."""

Event = tuple[int, "Report | BaseException | str | None"]
"""A worker, and a report, the end of its start ("up" or an error), or None for the end of a step or of the worker."""
Events = SimpleQueue[Event]


class DisaggregatedPipeline:
    """The steps, copies and restarts of all workers; for the engine, as one `StepPipeline`."""

    def __init__(
        self,
        scheduler: DisaggregatedScheduler,
        executors: Sequence[ProcessExecutor],
        group: KVGroup,
        sequences: Mapping[str, Answer],
        tokenizer: Tokenizer | None,
        events: Events,
        *,
        plans_ahead: bool,
        lease_seconds: float,
    ) -> None:
        self._scheduler, self._executors, self._events = scheduler, executors, events
        self._sequences = sequences
        self.timeline: Timeline | None = None
        self._desk = TransferDesk(group, executors, scheduler, time.monotonic, lease_seconds)
        self._starting: list[threading.Thread] = []
        self._pipelines = [
            RolePipeline(
                member.scheduler,
                executor,
                sequences,
                tokenizer,
                plans_ahead=plans_ahead,
                on_lost=partial(self._lose, member.number),
                on_submitted=partial(self._notify, member.number),
                on_chunks=partial(self._push_planned, member.number),
            )
            for member, executor in zip(scheduler.members, executors, strict=True)
        ]
        for pipeline in self._pipelines:
            pipeline.abort_request = scheduler.abort_request

    def advance(self) -> Progress:
        """Applies what has ended; waits a little if nothing has. Returns the sequences that changed."""
        self.plan()
        progress = self._finish()
        if progress.changed:
            return progress
        self._await_events(PAUSE_SECONDS if any(one.is_empty for one in self._pipelines) else WAIT_SECONDS)
        return self._finish()

    def plan(self) -> StepResults | None:
        """Begins the copies and steps that are possible now. Several workers have results, so none is returned."""
        self._dispatch()
        for member, pipeline in zip(self._scheduler.members, self._pipelines, strict=True):
            if member.is_up and self._executors[member.number].lost is None:
                pipeline.plan()
        return None

    def settle(self) -> None:
        """Completes steps, copies and changes of roles. Only for an engine without requests."""
        self._finish()
        self._dispatch()
        while any(one.has_steps for one in self._pipelines) or self._scheduler.transfers:
            self._await_events(WAIT_SECONDS)
            self._finish()
            self._dispatch()

    def forget(self, request_id: str) -> None:
        """Lets the workers drop a sequence with their next order."""
        for pipeline in self._pipelines:
            pipeline.forget(request_id)

    def close(self) -> None:
        """Waits for workers that are being started."""
        for thread in self._starting:
            thread.join()

    def _dispatch(self) -> None:
        for command in self._scheduler.dispatch():
            if isinstance(command, PushPiece):
                self._push(command)
            else:
                self._desk.cancel(command)
        for number, request_id in self._scheduler.take_moves():
            self._pipelines[number].forget(request_id)
        self._desk.kill_silent()
        self._desk.forget_arrived(self._scheduler.is_in_flight)

    def _push_planned(self, number: int, chunks: Sequence[Chunk], order: int) -> None:
        for command in self._scheduler.hand_out_planned(number, chunks):
            self._push(command, order)

    def _push(self, command: PushPiece, order: int = 0) -> None:
        self._desk.push(command, order)
        if self.timeline is not None:
            self.timeline.push(command, by_layer=order > 0)

    def _finish(self) -> Progress:
        changed: list[Answer] = []
        ended: list[Answer] = []
        for number, pipeline in enumerate(self._pipelines):
            found = pipeline.finish_done()
            if found.changed:
                self._desk.renew(number)
            changed += found.changed
            ended += found.ended
        self._scheduler.ended(answer.request.request_id for answer in ended)
        unservable = self._end_unservable()
        return Progress(changed + unservable, ended + unservable)

    def _end_unservable(self) -> list[Answer]:
        ended = []
        for request, reason in self._scheduler.take_unservable():
            sequence = self._sequences.get(request.request_id)
            self._scheduler.abort_request(request.request_id)
            if sequence is not None and not sequence.is_finished:
                self.forget(request.request_id)
                sequence.end_early(reason)
                ended.append(sequence)
        return ended

    # --- events ---

    def _await_events(self, seconds: float) -> None:
        try:
            self._take(*self._events.get(timeout=seconds))
            while True:
                self._take(*self._events.get_nowait())
        except Empty:
            return

    def _take(self, number: int, event: Report | BaseException | str | None) -> None:
        if isinstance(event, Report):
            self._desk.take(number, event)
            piece = PieceId(*event.key)
            if self.timeline is not None and not self._scheduler.is_in_flight(piece):
                self.timeline.end_piece(piece, has_arrived=event.kind == "received")
        elif isinstance(event, BaseException):
            raise event
        elif event == "up":
            LOG.info("worker %d has started again", number)
            self._scheduler.worker_is_up(number)
        elif (reason := self._executors[number].lost) is not None and not self._pipelines[number].has_steps:
            self._lose(number, reason)

    def _notify(self, number: int, step: StepInFlight) -> None:
        """Lets the engine know of the end of a step."""
        add_callback = getattr(step.results, "add_done_callback", None)
        if add_callback is None:
            return
        submitted = time.monotonic()

        def end(_: object) -> None:
            if self.timeline is not None:
                self.timeline.end_step(number, _name_of(step), submitted)
            self._events.put((number, None))

        add_callback(end)

    def _lose(self, number: int, reason: str) -> None:
        """A worker is lost: its requests are computed elsewhere, or when it has started again."""
        member = self._scheduler.members[number]
        if not member.is_up:
            return
        LOG.error("%s; %s worker %d is started again, and its requests are replayed", reason, member.role, number)
        self._pipelines[number].abandon()
        self._scheduler.lose_worker(number)
        self._desk.lose(number)
        arguments = (self._executors[number], number, member.epoch, self._events)
        thread = threading.Thread(target=_restart, args=arguments, name=f"sagellm-restart-{number}", daemon=True)
        self._starting = [one for one in self._starting if one.is_alive()] + [thread]
        thread.start()


def _restart(executor: ProcessExecutor, number: int, epoch: int, events: Events) -> None:
    try:
        executor.restart_in_epoch(epoch)
    except BaseException as error:
        events.put((number, error))
    else:
        events.put((number, "up"))


def _name_of(step: StepInFlight) -> str:
    """What a step computes, in a timeline."""
    chunks = [chunk.num_tokens for part in step.parts for chunk in part.order.chunks]
    num_decodes = sum(len(part.sampled) for part in step.parts if part.order.has_decodes)
    return f"prefill of {sum(chunks)} tokens" if chunks else f"decode of {num_decodes}"
