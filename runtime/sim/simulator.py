"""Discrete-event simulation of a trace with the engine's schedulers and a cost model.

Time is virtual and jumps from event to event. No decision depends on the machine that simulates, so the same trace
always produces the same result.
"""

from collections.abc import Callable, Iterable, Sequence

from sageLLM.runtime.sim.cluster import EventQueue, MakeCluster
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.trace import Trace

Check = Callable[[Sequence[Timeline], float], bool]
"""Whether a run can end at a time, by the timelines so far."""


class Simulation:
    """One run of a trace on a cluster."""

    def __init__(self, make_cluster: MakeCluster) -> None:
        self._events = EventQueue()
        self.cluster = make_cluster(self._events)
        self.refusals: dict[int, str] = {}
        self._has_ended = False

    @property
    def num_steps(self) -> int:
        """The number of steps of all workers."""
        return sum(worker.num_steps for worker in self.cluster.workers)

    def run(self, trace: Trace, check: Check | None = None, check_times: Iterable[float] = ()) -> list[Timeline]:
        """Serves the trace to its end; returns the timelines in its order, those of rejected requests without tokens.

        With a `check`, which reads the timelines at some times, the run ends when it returns True. Raises RuntimeError
        if requests are left without any worker to serve them, which is a scheduler bug.
        """
        timelines = [
            Timeline(number, one.arrival_s, one.num_prompt_tokens, one.num_output_tokens)
            for number, one in enumerate(trace)
        ]
        for when in check_times if check else ():
            self._events.put(when, lambda: self._check(check, timelines))
        self._put_arrival(trace, timelines, 0)
        self._events.run()
        if self.cluster.num_live and not self._has_ended:
            stuck = self.cluster.num_live
            raise RuntimeError(f"{stuck} requests wait at {self._events.clock.now:.3f} s and no worker will ever step")
        return timelines

    def _check(self, check: "Check | None", timelines: list[Timeline]) -> None:
        if check is not None and check(timelines, self._events.clock.now):
            self._has_ended = True
            self._events.clear()

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
