"""Workers of a deployment, and the routing of requests through them, driven by events in virtual time."""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sageLLM.runtime.scheduler.base import BaseScheduler
from sageLLM.runtime.scheduler.batch import KVMigration
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.step_cost import StepCostModel
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.pipeline import WHOLE, Stages
from sageLLM.runtime.sim.worker import LiveRequest, MakeScheduler, VirtualClock, Worker

Event = Callable[[], None]


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

    def clear(self) -> None:
        """Drops all events."""
        self._heap.clear()

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
    """The workers of one role: their scheduler and costs, their number, and the shares of a step of its stages.

    With several stages a worker has that many steps in flight: either those of one scheduler that plans a step while
    others are pending (`shares_scheduler`), as vLLM does, or one each of as many schedulers with separate requests and
    KV, as DistServe does. With `plans_ahead` each worker plans a step while another one runs. `make_scheduler` is
    called once per scheduler.
    """

    make_scheduler: MakeScheduler
    cost: StepCostModel
    num_workers: int = 1
    stage_shares: tuple[float, ...] = WHOLE
    shares_scheduler: bool = False
    plans_ahead: bool = False

    def make(self, clock: VirtualClock) -> list[Worker]:
        """The workers, one per step in flight."""
        return [worker for _ in range(self.num_workers) for worker in self._lanes(clock)]

    def _lanes(self, clock: VirtualClock) -> list[Worker]:
        stages = Stages(self.stage_shares)
        first = Worker(self.make_scheduler(clock), self.cost, clock, stages, self.plans_ahead)
        lanes = [first]
        for _ in range(len(self.stage_shares) - 1):
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
        worker = least_loaded(self.workers)
        worker.submit(live_request(timeline, prompt, timeline.num_output_tokens))
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
        assert len(kind.stage_shares) == 1, "workers that step together have one step in flight"
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


def least_loaded(workers: Sequence[Worker]) -> Worker:
    return min(workers, key=lambda worker: worker.num_live)


def live_request(timeline: Timeline, prompt: list[int], num_left: int) -> LiveRequest:
    request = Request(str(timeline.number), prompt, num_left, arrival_time=timeline.arrival_s)
    return LiveRequest(timeline, request, num_left, timeline.arrival_s)
