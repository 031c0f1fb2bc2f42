"""Plans the decodes of a step: one token for each request, in turns when there are more requests than seats.

A steady step costs O(requests that need a block or end), not O(requests): counts are offsets from the decode clock
(`Seat` in `request.py`), and two calendars say at which tick of the clock which request needs attention.
"""

from collections.abc import Callable, Iterable

from sageLLM.runtime.scheduler.batch import DecodeStepBatch
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.plan import DecodePlan, StepPlan
from sageLLM.runtime.scheduler.queues import TurnQueue
from sageLLM.runtime.scheduler.request import DecodeClock, Request, Seat

Calendar = dict[int, list[Seat]]
Roster = tuple[list[Request], list[int]]


class DecodePhase:
    """The line of requests whose prompt is computed (or planned) and whose KV is on the decode worker.

    `grow` is the scheduler's: it gives a request the block for its next token, preempting if it must, and says whether
    the request still runs in this step. `extend_each` gives each of several requests a block if there are enough.
    """

    def __init__(
        self,
        block_size: int,
        limits: SequenceLimits,
        grow: Callable[[Request, StepPlan], bool],
        extend_each: Callable[[list[str]], list[int] | None],
        max_context_tokens: int | None = None,
    ) -> None:
        self.queue: TurnQueue[Request] = TurnQueue()
        self.clock = DecodeClock()
        self._block_size = block_size
        self._limits = limits
        self._grow = grow
        self._extend_each = extend_each
        self._max_context_tokens = max_context_tokens
        self._growth: Calendar = {}
        self._ends: Calendar = {}
        self._everybody: Roster | None = None

    # --- the line ---

    def join(self, request: Request, in_flight: Iterable[DecodePlan]) -> None:
        """Give a seat to a request whose KV is complete. The decode steps already in flight do not count for it."""
        num_tokens = request.num_computed_tokens
        seat = self._seat(request, num_tokens, self._limits.num_outputs_left(request))
        seat.computed_offset = num_tokens - self.clock.committed
        for plan in in_flight:
            plan.skipped.append(seat)

    def join_ahead(self, request: Request) -> None:
        """Give a seat to a request whose last chunk of prefill is in flight."""
        self._seat(request, request.num_planned_tokens, self._limits.num_outputs_left(request) - 1)

    def _seat(self, request: Request, num_tokens: int, num_left: int) -> Seat:
        seat = Seat(request, self.clock, num_tokens)
        request.take_seat(seat)
        self.queue.append(request)
        self._everybody = None
        self._note_growth(seat)
        self._note_end(seat, self.clock.planned + max(1, num_left))
        return seat

    def commit_prefill(self, request: Request, num_tokens: int) -> None:
        """The prefill of a request that has a seat already is committed."""
        if request.seat is not None:
            request.seat.computed_offset = num_tokens - self.clock.committed

    def leave(self, request: Request) -> None:
        """Take a request's seat away. Its entries in the calendars die with the seat."""
        self.queue.remove(request)
        request.leave_seat()
        self._everybody = None

    # --- planning ---

    def num_blocks_due(self, num_steps: int) -> int:
        """Blocks that the requests need for the next `num_steps` tokens that are not planned yet."""
        rounds, rest = divmod(num_steps, self._block_size)
        ticks = range(self.clock.planned, self.clock.planned + rest)
        seats = [(seat, tick) for tick in ticks for seat in self._growth.get(tick, ())]
        return rounds * len(self.queue) + sum(seat.growth_tick == tick and _is_taken(seat) for seat, tick in seats)

    def plan(self, plan: StepPlan, max_requests: int, is_ahead: bool) -> None:
        """Add up to `max_requests` decodes to the plan, those that waited longest first.

        `is_ahead`: a step is in flight; those whose last token it computes are left out.
        """
        if not self.queue:
            return
        skipped = self._those_that_end() if is_ahead else {}
        if len(self.queue) > max_requests or self._max_context_tokens is not None:
            self._plan_turns(plan, max_requests, skipped)
            return
        self._grow_those_due(plan, skipped)
        if plan.preempted:
            skipped = {request_id: seat for request_id, seat in skipped.items() if _is_taken(seat)}
        self._fill(plan, self._all_but(skipped), skipped)

    def _those_that_end(self) -> dict[str, Seat]:
        tick = self.clock.planned
        seats = self._ends.get(tick, ())
        return {seat.request.request_id: seat for seat in seats if _is_taken(seat) and seat.end_tick == tick}

    def _grow_those_due(self, plan: StepPlan, skipped: dict[str, Seat]) -> None:
        """Give a block to each whose blocks are full; whoever gets none is added to `skipped`."""
        due = self._growth.pop(self.clock.planned, None)
        if due is None:
            return
        tick = self.clock.planned
        due = [seat for seat in due if seat.growth_tick == tick and seat.request.seat is seat]
        if skipped:
            due = [seat for seat in due if seat.request.request_id not in skipped]
        full = [seat for seat in due if not self._has_room(seat)]
        if len(full) < len(due):
            for seat in due:
                if self._has_room(seat):
                    self._note_growth(seat)
        if not self._grow_at_once(full, plan):
            self._grow_one_by_one(full, plan, skipped)

    def _grow_at_once(self, full: list[Seat], plan: StepPlan) -> bool:
        """The usual case: there are blocks enough for all."""
        ids = [seat.request.request_id for seat in full]
        blocks = self._extend_each(ids)
        if blocks is None:
            return False
        tick = self.clock.planned + self._block_size
        given = plan.given
        for seat, request_id, block in zip(full, ids, blocks, strict=True):
            if request_id in given:  # announced again after a roll-back
                given[request_id].append(block)
            else:
                given[request_id] = [block]
            seat.growth_tick = tick
        self._growth.setdefault(tick, []).extend(full)
        return True

    def _grow_one_by_one(self, full: list[Seat], plan: StepPlan, skipped: dict[str, Seat]) -> None:
        for seat in full:
            request = seat.request
            if request.seat is not seat:  # preempted a moment ago
                continue
            if self._grow(request, plan):
                self._note_growth(seat)
            elif request.seat is seat:
                skipped[request.request_id] = seat

    def _has_room(self, seat: Seat) -> bool:
        return seat.planned_offset + self.clock.planned < len(seat.request.kv_block_ids) * self._block_size

    def _all_but(self, skipped: dict[str, Seat]) -> Roster:
        if skipped:
            return _roster([request for request in self.queue if request.request_id not in skipped])
        if self._everybody is None:
            self._everybody = _roster(list(self.queue))
        return self._everybody

    def _plan_turns(self, plan: StepPlan, max_requests: int, skipped: dict[str, Seat]) -> None:
        """Serve the first `max_requests` of the line that can run; they go to its back."""
        served: dict[str, Request] = {}
        context_left = self._max_context_tokens
        for request in list(self.queue):
            if len(served) >= max_requests:
                break
            seat = request.seat
            if seat is None or request.request_id in skipped:  # preempted a moment ago, for one served before
                continue
            if context_left is not None:
                context_left -= request.num_planned_tokens + 1
                if context_left < 0 and served:
                    break
            if self._has_room(seat) or self._grow(request, plan):
                served[request.request_id] = request
            if plan.preempted:
                served = {request_id: r for request_id, r in served.items() if r.seat is not None}
        skipped = {r.request_id: r.seat for r in self.queue if r.seat is not None and r.request_id not in served}
        due = self._growth.pop(self.clock.planned, [])
        self._fill(plan, _roster(list(served.values())), skipped)
        for seat in due:
            if _is_taken(seat) and seat.growth_tick < self.clock.planned:  # not entered again by _fill, nor stale
                self._note_growth(seat)
        if plan.decode is not None:
            plan.decode.served_in_turn = list(served.values())
            for request in served.values():
                self.queue.to_back(request)

    def _fill(self, plan: StepPlan, roster: Roster, skipped: dict[str, Seat]) -> None:
        """Put the decodes into the plan and advance the clock; those left out are moved back by one."""
        requests, offsets = roster
        if requests:
            plan.decode = DecodePlan(DecodeStepBatch(0, requests, offsets, self.clock.planned), list(skipped.values()))
            self.clock.planned += 1
        for seat in skipped.values():
            if requests:
                seat.planned_offset -= 1
            self._note_growth(seat)
        if skipped:
            self._everybody = None

    # --- the calendars ---

    def _note_growth(self, seat: Seat) -> None:
        """Enter the tick at which the request's blocks are full."""
        due = len(seat.request.kv_block_ids) * self._block_size - seat.planned_offset
        seat.growth_tick = max(due, self.clock.planned)
        self._growth.setdefault(seat.growth_tick, []).append(seat)

    def _note_end(self, seat: Seat, tick: int) -> None:
        seat.end_tick = tick
        self._ends.setdefault(tick, []).append(seat)

    # --- what became of the step ---

    def commit(self, plan: DecodePlan) -> list[Request]:
        """Count the step's tokens as computed; returns the requests that may be full."""
        tick = self.clock.committed = self.clock.committed + 1
        for seat in plan.skipped:
            if seat.computed_offset is not None:
                seat.computed_offset -= 1
        if tick not in self._ends:
            return []
        seats = [seat for seat in self._ends.pop(tick) if _is_taken(seat) and seat.end_tick == tick]
        for seat in seats:  # those that are not full after all are asked again
            self._note_end(seat, tick + max(1, self._limits.num_outputs_left(seat.request)))
        return [seat.request for seat in seats]

    def roll_back(self, plan: DecodePlan) -> None:
        """Forget the decodes of the newest step in flight."""
        self.clock.planned -= 1
        self._everybody = None
        for seat in plan.skipped:
            seat.planned_offset += 1
            if _is_taken(seat):
                self._note_growth(seat)
        self.queue.to_front(plan.served_in_turn)


def _is_taken(seat: Seat) -> bool:
    return seat.request.seat is seat


def _roster(requests: list[Request]) -> Roster:
    """The requests with their offsets from the decode clock."""
    return requests, [request.seat.planned_offset for request in requests if request.seat is not None]
