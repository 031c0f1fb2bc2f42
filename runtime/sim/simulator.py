"""Discrete-event simulation of a trace with the engine's schedulers and a cost model.

Time is virtual and jumps from event to event. No decision depends on the machine that simulates, so the same trace
always produces the same result.
"""

from sageLLM.runtime.sim.cluster import EventQueue, MakeCluster
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.trace import Trace


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
