"""Discrete-event simulation of a trace with the engine's schedulers and a cost model.

Time is virtual and jumps from event to event. No decision depends on the machine that simulates, so the same trace
always produces the same result.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sageLLM.runtime.scheduler.base import BaseScheduler
from sageLLM.runtime.scheduler.batch import KVMigration
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.step_cost import StepCostModel
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.pipeline import Stages
from sageLLM.runtime.sim.trace import Trace
from sageLLM.runtime.sim.worker import LiveRequest, MakeScheduler, RoleWorker, VirtualClock, Worker

Event = Callable[[], None]
TransferTime = Callable[[int], float]


class EventQueue:
    """Events in order of time; simultaneous events in the order in which they were added."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self._heap: list[tuple[float, int, Event]] = []
        self._num_put = 0

    def put(self, when: float, event: Event) -> None:
        """Adds an event at a time that is not in the past."""
        # The counter makes simultaneous events first in, first out, and keeps events themselves from being compared.
        heapq.heappush(self._heap, (when, self._num_put, event))
        self._num_put += 1

    def run(self) -> None:
        """Runs all events, including those that they add."""
        while self._heap:
            self.clock.now, _, event = heapq.heappop(self._heap)
            event()


class Cluster(ABC):
    """Workers and the routing of requests through them."""

    def __init__(self, events: EventQueue) -> None:
        self.workers: list[Worker] = []
        self._events = events

    @abstractmethod
    def accept(self, timeline: Timeline, prompt: list[int]) -> None:
        """Starts to serve a request that arrives now. Raises ValueError if it can never be served."""

    @property
    def num_live(self) -> int:
        """The number of requests that are being served."""
        return sum(worker.num_live for worker in self.workers)

    def _drive(self, worker: Worker) -> None:
        """Starts a step on an idle worker when its first stage is free, and adds the event of its end."""
        if worker.is_busy or worker.waits_for_stage:
            return
        now = self._events.clock.now
        if worker.stages.free_s > now:
            worker.waits_for_stage = True
            self._events.put(worker.stages.free_s, lambda: self._resume(worker))
            return
        duration = worker.start_step()
        for copy in worker.take_copies():
            self._copy(worker, copy)
        if duration is not None:
            self._events.put(worker.stages.start(now, duration), lambda: self._end(worker))

    def _resume(self, worker: Worker) -> None:
        worker.waits_for_stage = False
        self._drive(worker)

    def _end(self, worker: Worker) -> None:
        for live in worker.end_step():
            self._leave(worker, live)
        for one in self._affected(worker):
            self._drive(one)

    def _affected(self, worker: Worker) -> Sequence[Worker]:
        """The workers that may have new work after a step of this worker."""
        return (worker,)

    def _leave(self, worker: Worker, live: LiveRequest) -> None:
        """Ends a request that has all its tokens from this worker."""
        live.timeline.last_token_s = live.last_token_s

    def _copy(self, worker: Worker, copy: KVMigration) -> None:
        raise AssertionError(f"{type(self).__name__} does not copy KV between workers")


MakeCluster = Callable[[EventQueue], Cluster]


@dataclass(frozen=True, slots=True)
class Kind:
    """The workers of one role: their scheduler and costs, their number, and the depth of their pipelines.

    With a depth above 1 a worker has that many steps in flight: either those of one scheduler that plans a step while
    others are pending (`shares_scheduler`), as vLLM does, or one each of as many schedulers with separate requests and
    KV, as DistServe does. `make_scheduler` is called once per scheduler.
    """

    make_scheduler: MakeScheduler
    cost: StepCostModel
    num_workers: int = 1
    depth: int = 1
    shares_scheduler: bool = False

    def make(self, clock: VirtualClock) -> list[Worker]:
        """The workers, one per step in flight."""
        return [worker for _ in range(self.num_workers) for worker in self._lanes(clock)]

    def _lanes(self, clock: VirtualClock) -> list[Worker]:
        stages = Stages(self.depth)
        first = Worker(self.make_scheduler(clock), self.cost, clock, stages)
        lanes = [first]
        for _ in range(self.depth - 1):
            scheduler = first.scheduler if self.shares_scheduler else self.make_scheduler(clock)
            lanes.append(Worker(scheduler, self.cost, clock, stages))
            if self.shares_scheduler:
                lanes[-1].share_requests(first)
        return lanes


class Colocated(Cluster):
    """Workers that each do prefill and decode; a request goes to the worker with the fewest requests."""

    def __init__(self, events: EventQueue, kind: Kind) -> None:
        super().__init__(events)
        self.workers = kind.make(events.clock)
        self._same_requests = _grouped(self.workers)

    @property
    def num_live(self) -> int:
        """The number of requests that are being served."""
        return sum(group[0].num_live for group in self._same_requests.values())

    def accept(self, timeline: Timeline, prompt: list[int]) -> None:
        """Starts to serve a request that arrives now. Raises ValueError if it can never be served."""
        worker = _least_loaded(self.workers)
        worker.submit(_live(timeline, prompt, timeline.num_output_tokens))
        for one in self._affected(worker):
            self._drive(one)

    def _affected(self, worker: Worker) -> Sequence[Worker]:
        return self._same_requests[worker.scheduler]


class Lockstep(Colocated):
    """Workers in groups of `size` that step together, because the experts of their layers are distributed over them.

    A step takes as long as that of the slowest worker of the group. A worker without work takes part in the exchanges
    of the others; requests that arrive during a step wait for its end.
    """

    def __init__(self, events: EventQueue, kind: Kind, size: int) -> None:
        super().__init__(events, kind)
        assert kind.depth == 1, "workers that step together have one step in flight"
        starts = range(0, len(self.workers), size)
        self._group_of = {worker: self.workers[i : i + size] for i in starts for worker in self.workers[i : i + size]}

    def _drive(self, worker: Worker) -> None:
        group = self._group_of[worker]
        if any(one.is_busy for one in group):
            return
        durations = [duration for one in group if (duration := one.start_step()) is not None]
        if durations:
            self._events.put(self._events.clock.now + max(durations), lambda: self._end_all(group))

    def _end_all(self, group: Sequence[Worker]) -> None:
        for worker in group:
            if worker.is_busy:
                for live in worker.end_step():
                    self._leave(worker, live)
        self._drive(group[0])


def _grouped(workers: Sequence[Worker]) -> dict[BaseScheduler, list[Worker]]:
    """The workers by scheduler."""
    groups: dict[BaseScheduler, list[Worker]] = {}
    for worker in workers:
        groups.setdefault(worker.scheduler, []).append(worker)
    return groups


class Paired(Cluster):
    """Pairs of a prefill and a decode worker, each pair under one scheduler in strict mode.

    The two workers of a pair step independently. A prompt is only admitted when the decode worker has room for it, and
    its KV arrives `transfer_s(tokens)` seconds after the prefill worker has computed it.
    """

    def __init__(
        self,
        events: EventQueue,
        make_scheduler: Callable[[VirtualClock], PDScheduler],
        costs: tuple[StepCostModel, StepCostModel],
        transfer_s: TransferTime,
        num_pairs: int,
    ) -> None:
        super().__init__(events)
        self._transfer_s = transfer_s
        self._pairs: dict[Worker, tuple[RoleWorker, RoleWorker]] = {}
        for _ in range(num_pairs):
            scheduler = make_scheduler(events.clock)
            prefill = RoleWorker(scheduler, costs[0], events.clock, "prefill")
            decode = RoleWorker(scheduler, costs[1], events.clock, "decode")
            decode.share_requests(prefill)
            self._pairs[prefill] = self._pairs[decode] = (prefill, decode)
        self.workers = list(self._pairs)

    @property
    def num_live(self) -> int:
        """The number of requests that are being served; both workers of a pair count each of theirs."""
        return super().num_live // 2

    def accept(self, timeline: Timeline, prompt: list[int]) -> None:
        """Starts to serve a request that arrives now. Raises ValueError if it can never be served."""
        prefill = _least_loaded(self.workers[::2])  # every second worker is a pair's prefill worker
        prefill.submit(_live(timeline, prompt, timeline.num_output_tokens))
        self._drive(prefill)

    def _affected(self, worker: Worker) -> Sequence[Worker]:
        return self._pairs[worker]

    def _copy(self, worker: Worker, copy: KVMigration) -> None:
        decode = self._pairs[worker][1]

        def arrive() -> None:
            decode.scheduler.confirm_migrations([copy.request_id])
            for one in self._pairs[worker]:
                self._drive(one)

        self._events.put(self._events.clock.now + self._transfer_s(copy.num_tokens), arrive)


class Disaggregated(Cluster):
    """Any numbers of prefill and decode workers, each with its own scheduler (DistServe, arXiv 2401.09670).

    A prefill worker computes a prompt and its first token; `transfer_s(tokens)` seconds later the KV is on the decode
    worker with the fewest requests, which computes the rest. KV that waits for room there occupies no memory of the
    prefill worker, as if it waited in host memory.
    """

    def __init__(self, events: EventQueue, prefill: Kind, decode: Kind, transfer_s: TransferTime) -> None:
        super().__init__(events)
        self._transfer_s = transfer_s
        self._prefill, self._decode = prefill.make(events.clock), decode.make(events.clock)
        self.workers = self._prefill + self._decode

    def accept(self, timeline: Timeline, prompt: list[int]) -> None:
        """Starts to serve a request that arrives now. Raises ValueError if it can never be served."""
        worker = _least_loaded(self._prefill)
        worker.submit(_live(timeline, prompt, 1))
        self._drive(worker)

    def _leave(self, worker: Worker, live: LiveRequest) -> None:
        timeline = live.timeline
        if timeline.num_output_tokens == 1 or worker in self._decode:
            super()._leave(worker, live)
            return
        arrival = self._events.clock.now + self._transfer_s(timeline.num_prompt_tokens)
        self._events.put(arrival, lambda: self._receive(live))

    def _receive(self, live: LiveRequest) -> None:
        timeline, prompt = live.timeline, live.request.prompt_token_ids
        request = Request(
            live.request.request_id,
            prompt,
            max_new_tokens=timeline.num_output_tokens,
            output_token_ids=[0],
            arrival_time=timeline.arrival_s,
            num_computed_tokens=len(prompt),
        )
        worker = _least_loaded(self._decode)
        if worker.scheduler.why_not_acceptable(request) is not None:  # its first token fills the maximum length
            timeline.num_output_tokens = 1
            super()._leave(worker, live)
            return
        worker.receive(LiveRequest(timeline, request, timeline.num_output_tokens - 1, live.last_token_s))
        self._drive(worker)


def _least_loaded(workers: Sequence[Worker]) -> Worker:
    return min(workers, key=lambda worker: worker.num_live)


def _live(timeline: Timeline, prompt: list[int], num_left: int) -> LiveRequest:
    request = Request(str(timeline.number), prompt, num_left, arrival_time=timeline.arrival_s)
    return LiveRequest(timeline, request, num_left, timeline.arrival_s)


class Simulation:
    """One run of a trace on a cluster."""

    def __init__(self, make_cluster: MakeCluster) -> None:
        self._events = EventQueue()
        self.cluster = make_cluster(self._events)
        self.refusals: dict[int, str] = {}

    @property
    def num_steps(self) -> int:
        """The number of steps of all workers."""
        return sum(worker.num_steps for worker in self.cluster.workers)

    def run(self, trace: Trace) -> list[Timeline]:
        """Serves the trace to its end; returns the timelines in its order, those of rejected requests without tokens.

        Raises RuntimeError if requests are left without any worker to serve them, which is a scheduler bug.
        """
        timelines = [
            Timeline(number, one.arrival_s, one.num_prompt_tokens, one.num_output_tokens)
            for number, one in enumerate(trace)
        ]
        self._put_arrival(trace, timelines, 0)
        self._events.run()
        if self.cluster.num_live:
            stuck = self.cluster.num_live
            raise RuntimeError(f"{stuck} requests wait at {self._events.clock.now:.3f} s and no worker will ever step")
        return timelines

    def _put_arrival(self, trace: Trace, timelines: list[Timeline], number: int) -> None:
        """Adds the event of an arrival, which adds the next one, so that prompts exist only while they are served."""
        if number == len(trace):
            return

        def arrive() -> None:
            self._put_arrival(trace, timelines, number + 1)
            try:
                self.cluster.accept(timelines[number], trace[number].prompt_token_ids(number))
            except ValueError as error:
                self.refusals[number] = str(error)

        self._events.put(trace[number].arrival_s, arrive)
