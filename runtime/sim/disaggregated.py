"""Prefill and decode on different workers, with a transfer of KV between them."""

from collections.abc import Callable, Sequence

from sageLLM.runtime.scheduler.batch import KVMigration
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.step_cost import StepCostModel
from sageLLM.runtime.sim.cluster import Cluster, EventQueue, Kind, least_loaded, live_request
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.worker import LiveRequest, RoleWorker, VirtualClock, Worker

TransferTime = Callable[[int], float]


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
        prefill = least_loaded(self.workers[::2])  # every second worker is a pair's prefill worker
        prefill.submit(live_request(timeline, prompt, timeline.num_output_tokens))
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
        worker = least_loaded(self._prefill)
        worker.submit(live_request(timeline, prompt, 1))
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
        worker = least_loaded(self._decode)
        if worker.scheduler.why_not_acceptable(request) is not None:  # its first token fills the maximum length
            timeline.num_output_tokens = 1
            super()._leave(worker, live)
            return
        worker.receive(LiveRequest(timeline, request, timeline.num_output_tokens - 1, live.last_token_s))
        self._drive(worker)
