"""Engine of prefill and decode workers in processes, each of which steps at its own pace and copies KV to others."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.engine.answer_rows import Progress
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.pd_timeline import Timeline
from sageLLM.runtime.engine.pipeline import StepInFlight, StepPipeline
from sageLLM.runtime.engine.sequences import Sequence as Answer
from sageLLM.runtime.engine.transfer_desk import TransferDesk
from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.kv.copies import KVStats
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.disaggregated import DisaggregatedScheduler
from sageLLM.runtime.scheduler.group_transfers import LoadFailurePolicy
from sageLLM.runtime.scheduler.member import WorkerStatus
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.scheduler.transfer_commands import PieceId, PushPiece
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.transport.base import Report
from sageLLM.runtime.worker.executor import StepResults
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.io_report import IoReport
from sageLLM.runtime.worker.kv_group import KVGroup
from sageLLM.runtime.worker.orders import GroupOrder
from sageLLM.runtime.worker.prefill_decode import close_memory
from sageLLM.runtime.worker.process_executor import ProcessExecutor

LEASE_SECONDS = 10.0
"""The default lease of a copy between two processes."""
WAIT_SECONDS = 0.05
"""The engine returns to its callers at least this often while nothing ends."""
PAUSE_SECONDS = 0.002
"""The wait after a step that had nothing to compute."""

Event = tuple[int, "Report | BaseException | str | None"]
"""A worker, and a report, the end of its start ("up" or an error), or None for the end of a step or of the worker."""
Events = SimpleQueue[Event]


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
        """Completes the steps and copies in flight. Only for an engine without requests."""
        while any(one.has_steps for one in self._pipelines) or self._scheduler.transfers:
            self._finish()
            self._dispatch()
            if any(one.has_steps for one in self._pipelines) or self._scheduler.transfers:
                self._await_events(WAIT_SECONDS)

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


class ExecutorGroup:
    """The executors of the workers of a group, for what concerns all of them."""

    def __init__(self, executors: Sequence[ProcessExecutor], group: KVGroup) -> None:
        self.executors = list(executors)
        self._close_memory = weakref.finalize(self, close_memory, group)

    @property
    def process_ids(self) -> list[int]:
        """The operating system's ids of all worker processes."""
        return [process_id for executor in self.executors for process_id in executor.process_ids]

    def wait(self) -> None:
        for executor in self.executors:
            executor.wait()

    def close(self) -> None:
        for executor in self.executors:
            executor.close()
        self._close_memory()

    def submit(self, order: GroupOrder) -> StepResults:
        raise AssertionError("each worker of the group has its own orders")

    def io_reports(self, hardware: Hardware) -> list[IoReport]:
        return [report for executor in self.executors for report in executor.io_reports(hardware)]

    def reset(self) -> None:
        self.wait()

    def restart(self) -> None:
        raise AssertionError("each worker of the group is started again by itself")


class DisaggregatedEngine(Engine):
    """Serves requests on prefill and decode workers; `workers` reports them, and `set_role` changes the role of one."""

    executor: ExecutorGroup

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        compiler: ModelCompiler,
        config: PDSchedulerConfig,
        budgets: Sequence[KVBudget],
        executors: Sequence[ProcessExecutor],
        roles: Sequence[Role],
        group: KVGroup,
        events: Events,
        *,
        policy: LoadFailurePolicy = "recompute",
        eos_token_ids: frozenset[int] = frozenset(),
        async_scheduling: bool = True,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`budgets`, `executors` and `roles` are those of each worker of the `group`."""
        transfer = config.transfer
        if transfer.lease_s is None:
            transfer = replace(transfer, lease_s=LEASE_SECONDS)
        self._transfer, self._policy = transfer, policy
        self._budgets, self._roles, self._kv_group, self._events = budgets, list(roles), group, events
        self._epochs = [0] * len(roles)
        super().__init__(
            model,
            tokenizer,
            compiler,
            config,
            budgets[0],
            ExecutorGroup(executors, group),
            eos_token_ids=eos_token_ids,
            async_scheduling=async_scheduling,
            grammars=grammars,
        )

    def _start(self) -> None:
        schedulers = [self._role_scheduler(*pair) for pair in zip(self._budgets, self._roles, strict=True)]
        self._whole = schedulers[0]
        num_ranks = [member.tp for member in self._kv_group.members]
        self.group = DisaggregatedScheduler(
            schedulers, self._transfer, time.monotonic, num_ranks=num_ranks, policy=self._policy
        )
        for member, epoch in zip(self.group.members, self._epochs, strict=True):
            member.epoch = epoch
        self._scheduler = self.group
        self._pipeline = self._steps = DisaggregatedPipeline(
            self.group,
            self.executor.executors,
            self._kv_group,
            self._sequences,
            self.tokenizer,
            self._events,
            plans_ahead=self._plans_ahead,
            lease_seconds=self._transfer.lease_s or LEASE_SECONDS,
        )

    def _role_scheduler(self, budget: KVBudget, role: Role) -> PDScheduler:
        return PDScheduler(
            self._config,
            kv_budget=budget,
            max_model_len=self.model.max_model_len,
            switch_len=self.model.tables.switch_len,
            clock=time.monotonic,
            role=role,
        )

    def record_timeline(self) -> Timeline:
        """Records steps and transfers from now on."""
        self._steps.timeline = Timeline()
        return self._steps.timeline

    def workers(self) -> list[WorkerStatus]:
        """Number, role, state and load of each worker."""
        return self.group.workers()

    def set_role(self, number: int, role: Role) -> None:
        """Lets a worker take another role while requests are served. ValueError for the last worker of its role."""
        self.group.set_role(number, role)

    def kv_stats(self) -> dict[str, KVStats]:
        if not self.has_work:
            self._pipeline.settle()
        members = self.group.members
        return {f"{member.role} {member.number}": member.scheduler.kv.decode.stats() for member in members}

    def reset_prefix_cache(self) -> None:
        self._pipeline.settle()
        for member in self.group.members:
            member.scheduler.kv.decode.reset_prefix_cache()

    def reset(self, error: BaseException) -> EngineError:
        """Starts all workers again: copies may be in flight."""
        self._steps.close()
        self._roles = [member.role for member in self.group.members]
        self._epochs = [member.epoch + 1 for member in self.group.members]
        for executor, epoch in zip(self.executor.executors, self._epochs, strict=True):
            executor.restart_in_epoch(epoch)
        while not self._events.empty():
            self._events.get()
        return super().reset(error)

    def close(self) -> None:
        self._steps.close()
        super().close()
