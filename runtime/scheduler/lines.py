"""Where the requests of the PD scheduler stand, and how they enter, go back and end.

A running request is in one of three lines, prefill, transfer, or decode; a waiting one in the waiting line or among the
forks. Who has ended stays in limbo while a step or a copy in flight may touch its blocks.
"""

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection

from sageLLM.runtime.scheduler.base import BaseScheduler
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.scheduler.decode import DecodePhase
from sageLLM.runtime.scheduler.forks import ForkLine
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.modes import ModeChooser
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.plan import DecodePlan, Flight, StepPlan
from sageLLM.runtime.scheduler.policy import Policy, make_policy
from sageLLM.runtime.scheduler.prefill import PrefillPhase
from sageLLM.runtime.scheduler.queues import TurnQueue
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.stats import SchedulerCounters
from sageLLM.runtime.scheduler.transfer import TransferEvent, TransferPhase, TransferState


class RequestLines(BaseScheduler):
    """The lines, and what every change of place entails; `PDScheduler` documents the parameters."""

    def __init__(
        self,
        config: PDSchedulerConfig | None = None,
        *,
        kv_budget: KVBudget | None = None,
        max_model_len: int | None = None,
        clock: Callable[[], float] = time.time,
        policy: Policy | None = None,
        mode_chooser: ModeChooser | None = None,
    ) -> None:
        self.config = config or PDSchedulerConfig()
        super().__init__(
            max_batch_size=max(self.config.max_prefill_batch_size, self.config.max_decode_batch_size),
            max_tokens=max(self.config.max_prefill_tokens, self.config.max_decode_tokens),
            policy=policy or make_policy(self.config.policy, self.config.tenant_weights),
            max_overtakes=self.config.max_overtakes,
        )
        if (self.config.mode == "auto") != (mode_chooser is not None):
            raise ValueError("mode 'auto' needs a mode_chooser, and no other mode takes one")
        is_split = self.config.mode == "strict"
        self.kv = KVPlacement(kv_budget, is_split, self.config.enable_prefix_caching)
        self.limits = SequenceLimits(max_model_len, self.kv.max_tokens, self.kv.block_size)
        self._clock = clock
        self._mode_chooser = mode_chooser
        self._prefill = PrefillPhase(self.waiting_queue, self._can_admit, self._admit)
        self._decode = DecodePhase(
            self.kv.block_size, self.limits, self._grow, self.kv.extend_each, self.config.max_decode_context_tokens
        )
        self._migration = TransferPhase(self.kv, self.config.transfer)
        # Ended while the device may still touch their blocks, with the newest step that may.
        self._limbo: dict[str, tuple[Request, int]] = {}
        self._flights: deque[Flight] = deque()
        self._received: set[str] = set()
        self._swapping: dict[str, None] = {}  # a set whose order is that of entry
        self._forks = ForkLine()
        self._next_plan = StepPlan()
        self._num_consecutive_decodes = 0
        self._num_steps = 0
        self._counters = SchedulerCounters()

    @property
    def max_seq_len(self) -> int | None:
        """The longest prompt + output that any request can reach, in tokens; None when nothing bounds it."""
        return self.limits.max_seq_len

    @property
    def prefill_queue(self) -> list[Request]:
        """All requests with prompt left to compute, waiting or started, by rank."""
        return sorted([*self.waiting_queue, *self._prefill.started.values()], key=lambda request: request.rank)

    @property
    def decode_queue(self) -> TurnQueue[Request]:
        """The requests that decode, the next one to be served first."""
        return self._decode.queue

    def why_not_acceptable(self, request: Request) -> str | None:
        """The reason why `add_request` would refuse, or None."""
        reason = super().why_not_acceptable(request)
        if reason is not None:
            return reason
        if request.request_id in self._forks:
            return f"request {request.request_id!r} is already being served; ids of live requests must differ"
        if request.request_id in self._limbo or request.request_id in self._swapping:
            return f"request {request.request_id!r} was aborted in the step in flight; its id is free after that step"
        return self.limits.why_too_long(request)

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it is empty, was used before, has a live one's id, or can never run."""
        super().add_request(request)
        if self._mode_chooser is not None:
            self._mode_chooser.observe(request)
        self.kv.track(request)
        parent = request.fork_of
        if parent is not None and self._can_wait_for(parent, request):
            self.waiting_queue.remove(request)
            self._forks.add(request, parent)

    def _can_wait_for(self, parent: Request, fork: Request) -> bool:
        is_live = self._find(parent.request_id) is parent
        is_new = not parent.output_token_ids and parent.seat is None and parent.request_id not in self._forks
        return is_live and is_new and not self.kv.is_split and parent.prompt_token_ids == fork.prompt_token_ids

    def forks_of(self, request_id: str) -> list[Request]:
        """The forks that wait for this request's prefill; each gets a first token from its last chunk's logits."""
        return self._forks.of(request_id)

    def get_num_waiting(self) -> int:
        """Requests without KV: new ones, preempted ones, and forks."""
        return len(self.waiting_queue) + len(self._forks)

    def _find(self, request_id: str) -> Request | None:
        running = self.running_requests.get(request_id)
        return running or self.waiting_queue.get(request_id) or self._forks.get(request_id)

    def add_received(self, request: Request) -> None:
        """Queue a request whose prompt was computed elsewhere: it has its first output token, and decodes at once.

        It gets blocks for all its tokens; whoever sent its KV fills them when the step that announces them runs. If it
        is preempted it is computed from its first token, here. Raises ValueError as `add_request` does.
        """
        if self.kv.is_split:
            raise ValueError("in strict mode requests are prefilled by the scheduler's own prefill worker")
        num_tokens = request.total_tokens - 1
        if not request.output_token_ids or request.num_computed_tokens != num_tokens:
            raise ValueError(
                f"request {request.request_id!r} has {request.num_computed_tokens} computed tokens; "
                "a received one has all its tokens computed but the newest output token"
            )
        self.add_request(request)
        self.kv.forget(request)  # it shares no blocks: all of them will be written to
        self._received.add(request.request_id)

    def abort_request(self, request_id: str) -> bool:
        """End a request in whatever state it is; False when no live request has this id.

        If a step is in flight, the request's part of it is ignored, outputs included, and its blocks return to the pool
        when the step ends.
        """
        request = self._find(request_id)
        if request is None:
            return False
        self._retire(request)
        self._counters.total_aborted += 1
        return True

    def _finish(self, request: Request) -> None:
        self._retire(request)
        self._counters.total_finished += 1

    def _retire(self, request: Request) -> None:
        """End a request. Blocks that a step or a copy in flight may touch go back when that is over."""
        self._release_forks(request)
        if request.request_id in self._forks:
            self._forks.remove(request)
            self.kv.forget(request)
        elif request.request_id in self.waiting_queue:
            self.waiting_queue.remove(request)
            self.preempted_requests.pop(request.request_id, None)
            self._received.discard(request.request_id)
            if request.request_id in self._next_plan.tier_copies:
                self._drop_swap(request.request_id)  # the engine is not copying it
            self.kv.release_swapped(request)
            self.kv.forget(request)
        else:
            self._leave_line(request)
            self._migration.leave(request, TransferEvent.END)
            self._limbo[request.request_id] = (request, self._num_steps - 1)
        request.status = RequestStatus.FINISHED
        request.finish_time = self._clock()
        if not self._flights:
            self._empty_limbo()

    def _leave_line(self, request: Request) -> None:
        del self.running_requests[request.request_id]
        if request.seat is not None:
            self._decode.leave(request)
        else:
            self._prefill.started.pop(request.request_id, None)

    def _empty_limbo(self) -> None:
        oldest_in_flight = self._flights[0].step_id if self._flights else self._num_steps
        for request_id, (request, last_step) in list(self._limbo.items()):
            is_copied = request_id in self._migration.copying or request_id in self._swapping
            if last_step < oldest_in_flight and not is_copied:
                still_shared = self.kv.release(request, unannounced=self._next_plan.drop(request))
                self._next_plan.give(request, still_shared)
                self.kv.forget(request)
                del self._limbo[request_id]

    def _requeue(self, request: Request, unannounced: Collection[int] = ()) -> list[int]:
        """Take a request's KV away; it waits at its old rank to be computed again.

        Returns those of the `unannounced` blocks that others use.
        """
        self._counters.total_recomputed_tokens += request.num_computed_tokens
        self._go_back(request)
        still_shared = self.kv.release(request, unannounced)
        self._next_plan.forget(request)
        request.forget_progress()
        return still_shared

    def _go_back(self, request: Request) -> None:
        self._leave_line(request)
        self._migration.leave(request, TransferEvent.LOSE)
        self._release_forks(request)
        for flight in self._flights:
            flight.void.add(request.request_id)
        self._counters.total_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.preempted_requests[request.request_id] = request
        self.waiting_queue.push(request)

    def _drop_swap(self, request_id: str) -> None:
        self._swapping.pop(request_id, None)
        self._next_plan.tier_copies.pop(request_id, None)
        freed = self.kv.abort_swap(request_id)
        if freed:
            unheard = self._next_plan.given.pop(request_id, [])
            self.kv.freed += [block for block in freed if block not in unheard]

    def _release_forks(self, parent: Request) -> None:
        for fork in self._forks.take(parent.request_id):
            self._wait_in_line(fork)

    def _wait_in_line(self, fork: Request) -> None:
        if fork.output_token_ids:
            fork.status = RequestStatus.PREEMPTED
            self.preempted_requests[fork.request_id] = fork
        self.waiting_queue.push(fork)

    def _start_decoding(self, request: Request) -> None:
        request.status = RequestStatus.DECODING
        self._decode.join(request, self._decodes_in_flight)

    @property
    def _decodes_in_flight(self) -> list[DecodePlan]:
        return [flight.decode for flight in self._flights if flight.decode is not None]

    def get_stats(self) -> dict[str, int]:
        """Counters since the start (`total_*`; batches and tokens as planned) and sizes now, of lines and KV blocks."""
        stats = self._counters.as_dict()
        stats["prefill_queue_size"] = len(self._prefill)
        stats["decode_queue_size"] = len(self.decode_queue)
        stats["migrating_size"] = len(self._migration)
        stats["num_waiting"] = self.get_num_waiting()
        stats["num_running"] = self.get_num_running()
        stats["num_preempted"] = len(self.preempted_requests)
        stats["kv_blocks_used"] = self.kv.decode.pool.num_used
        if self.kv.is_split:
            stats["prefill_kv_blocks_used"] = self.kv.prefill.pool.num_used
        return stats

    def check_integrity(self) -> None:
        """Check that each live request is in exactly one line and that exactly the running ones hold blocks."""
        sending = [i for i, t in self._migration.transfers.items() if t.state is TransferState.SENDING]
        lines = [*self._prefill.started, *sending]
        lines += [request.request_id for request in self.decode_queue]
        assert len(set(lines)) == len(lines), "a request is in two lines"
        running = self.running_requests.keys()
        assert set(lines) - self._limbo.keys() == running, f"running requests in no line: {running ^ set(lines)}"
        assert not any(request_id in running for request_id in self._limbo), "an ended request still runs"
        assert not any(request.request_id in running for request in self.waiting_queue), "a request waits and runs"
        waiting_preempted = {r.request_id for r in self.waiting_queue if r.status is RequestStatus.PREEMPTED}
        assert self.preempted_requests.keys() == waiting_preempted, "a preempted request does not wait"
        leaving = [i for i in self.preempted_requests if self.kv.decode.holds(i)]
        assert all(self.kv.decode.is_in_transfer(i) for i in leaving), "a waiting request holds blocks"
        self.kv.check_integrity([*running, *self._limbo, *leaving])

    def transfer_state(self, request_id: str) -> TransferState | None:
        """Where a request of strict mode stands; None when no live request has this id."""
        if request_id in self.waiting_queue:
            return TransferState.QUEUED
        if request_id not in self.running_requests:
            return None
        transfer = self._migration.transfers.get(request_id)
        return TransferState.DECODING if transfer is None else transfer.state

    @abstractmethod
    def _can_admit(self, request: Request) -> bool:
        """Whether a waiting request may start to be prefilled."""

    @abstractmethod
    def _admit(self, request: Request, plan: StepPlan) -> None:
        """Give a request its blocks; it is prefilled from now on."""

    @abstractmethod
    def _grow(self, request: Request, plan: StepPlan) -> bool:
        """Give a decode the block of its next token; False when it sits the step out."""
