"""What becomes of requests when steps, copies or workers fail."""

from collections.abc import Iterable

from sageLLM.runtime.scheduler.admission import Admission
from sageLLM.runtime.scheduler.batch import Chunk
from sageLLM.runtime.scheduler.plan import Flight, Role
from sageLLM.runtime.scheduler.request import Request
from sageLLM.runtime.scheduler.transfer import Transfer, TransferEvent


class Recovery(Admission):
    """Roll-back of planned steps, acknowledgements and failures of copies, deaths of workers."""

    def rollback_step(self) -> None:
        """Forget the steps in flight, say because the device failed: their tokens and copies are planned again.

        Admissions and preemptions stand; blocks given or freed are announced again by the next output.
        """
        self._roll_back_flights(None)

    def rollback_ahead(self) -> None:
        """Forget the step that was planned ahead; the one in flight goes on."""
        if len(self._flights) > 1:
            self._roll_back(self._flights.pop())
            self._empty_limbo()

    def _roll_back_flights(self, role: Role | None) -> None:
        """Roll back, the newest first, the steps of one worker, or all."""
        for flight in list(reversed(self._flights)):
            if role is None or flight.role == role:
                self._flights.remove(flight)
                self._roll_back(flight)
        self._empty_limbo()

    def _roll_back(self, flight: Flight) -> None:
        output = flight.output
        for migration in output.kv_migrations:
            was_announced = output.kv_blocks_to_allocate.pop(migration.request_id, None) is not None
            self._migration.take_back(migration, was_announced)
        self._migration.ask_again(output.migrations_to_cancel)
        for chunk in flight.prefill_chunks:
            self._take_back(chunk)
        if flight.decode is not None:
            self._decode.roll_back(flight.decode)
        self._num_consecutive_decodes = flight.streak_before
        self._announce_again(flight)

    def _take_back(self, chunk: Chunk) -> None:
        """A chunk of prefill was not computed after all."""
        request = chunk.request
        if request.request_id not in self.running_requests:
            return
        if request.seat is not None:  # it was to decode in the step planned ahead
            self._decode.leave(request)
            self._prefill.started[request.request_id] = request
        request.plan_up_to(chunk.start)

    def _announce_again(self, flight: Flight) -> None:
        """The engine forgets what this output said of blocks and copies; the next one says it again."""
        output, plan = flight.output, self._next_plan
        live = self.running_requests.keys() | self._limbo.keys() | self._swapping.keys()
        given = {i: list(b) for i, b in output.kv_blocks_to_allocate.items() if i in live or not self.kv.is_split}
        for request_id, blocks in plan.given.items():
            given.setdefault(request_id, []).extend(blocks)
        plan.given = given
        plan.num_cached = {i: num for i, num in output.num_cached_tokens.items() if i in live} | plan.num_cached
        plan.block_copies = {i: c for i, c in flight.block_copies.items() if i in live} | plan.block_copies
        for copy in output.tier_copies:
            if self._find(copy.seq_id) is None and copy.seq_id not in self._limbo:
                self._drop_swap(copy.seq_id)
            else:
                plan.tier_copies[copy.seq_id] = copy
        self.kv.freed = output.kv_blocks_to_free + self.kv.freed
        self.kv.freed_prefill = output.prefill_blocks_to_free + self.kv.freed_prefill

    def confirm_migrations(self, request_ids: Iterable[str]) -> None:
        """The KV of these requests has arrived on the decode worker (on all of its ranks): they may decode."""
        for request_id in request_ids:
            self._receive(self._migration.arrive(request_id))
        if self._limbo:
            self._empty_limbo()

    def acknowledge_migration(
        self, request_id: str, start: int, attempt: int, rank: int = 0, layers: Iterable[int] | None = None
    ) -> None:
        """One rank of the decode worker has received some layers (None: all) of one piece of a request's KV.

        `start` and `attempt` are those of the `KVMigration`. The request decodes once every piece is complete; an
        acknowledgement that comes twice, late or for another attempt changes nothing.
        """
        self._receive(self._migration.acknowledge(request_id, start, attempt, rank, layers))
        if self._limbo:
            self._empty_limbo()

    def _receive(self, transfer: Transfer | None) -> None:
        """All of a request's KV is there: it goes on in the decode pool."""
        if transfer is None:
            return
        request = transfer.request
        transfer.on(TransferEvent.ALL_ARRIVED)
        self.kv.arrive(request)
        del self._migration.transfers[request.request_id]
        self._start_decoding(request)
        transfer.on(TransferEvent.START)

    def fail_migrations(self, request_ids: Iterable[str]) -> None:
        """The copies of these requests are over and have not arrived: they are handed out again.

        Outputs of steps in flight lose those that have not begun. After `max_attempts` failures the request goes back
        to the waiting line and is computed from its first token.
        """
        for request_id in request_ids:
            given_up = self._migration.fail(request_id)
            if given_up is not None:
                self._requeue(given_up.request)
        self._withdraw_superseded()
        self._empty_limbo()

    def _withdraw_superseded(self) -> None:
        """Steps in flight lose the copies that are not wanted any more: begun now, they would write over newer KV."""
        sender_of = self._migration.sender_of
        for flight in self._flights:
            for pieces in (flight.output.kv_migrations, flight.output.migrations_to_cancel):
                pieces[:] = [p for p in pieces if sender_of(p.request_id, p.start, p.attempt) is not None]

    def fail_swaps(self, request_ids: Iterable[str]) -> None:
        """Copies between tiers of these requests failed. They are computed again; a step in flight that holds the
        copies, or chunks of these requests, must be rolled back first.
        """
        for request_id in request_ids:
            if request_id not in self._swapping:
                continue
            self._drop_swap(request_id)
            request = self._find(request_id)
            if request is not None:
                self._lose_swapped(request)

    def lose_kv(self, role: Role | None = None) -> None:
        """A worker has died and comes back with an empty KV cache: in strict mode one of the two, or both if None.

        The steps that it takes part in are rolled back. What it held is computed again: whose KV was only to be sent is
        sent again, others go back to the waiting line at their rank and emit nothing twice. No copy is under way.
        """
        for flight in list(reversed(self._flights)):
            if role is None or flight.role in (None, role):
                self._flights.remove(flight)
                self._roll_back(flight)
        lost: list[Request] = []
        if self.kv.is_split and role != "decode":
            lost += self._migration.lose_source()
        if self.kv.is_split and role != "prefill":
            self._migration.lose_target()
        if self.kv.is_split:
            self._withdraw_superseded()
        if role != "prefill":
            lost += self.decode_queue
        if not self.kv.is_split:
            lost += self._prefill.started.values()
        for request in lost:
            self._requeue_now(request)
        if role != "prefill":
            self._lose_tiers()
        if role != "decode" or not self.kv.is_split:
            self._forget_cached()
        self._empty_limbo()

    def _forget_cached(self) -> None:
        """Where prompts are computed no KV is left that others could share."""
        for request, _ in self._limbo.values():
            request.forget_progress()
        self.kv.prefill.reset_prefix_cache()

    def _requeue_now(self, request: Request) -> None:
        """Between two steps: what the engine was to hear next of the request's blocks is void, or shared by others."""
        still_shared = self._requeue(request, unannounced=self._next_plan.drop(request))
        self._next_plan.give(request, still_shared)

    def _lose_tiers(self) -> None:
        for request_id in list(self._swapping):
            self._drop_swap(request_id)
        for request in self.preempted_requests.values():
            self._lose_swapped(request)

    def _lose_swapped(self, request: Request) -> None:
        """What a tier has of this request is lost."""
        if request.request_id in self.running_requests:
            self._requeue_now(request)
        self._counters.total_recomputed_tokens += request.num_computed_tokens
        self.kv.release_swapped(request)
        request.forget_progress()
