"""Queue of decoding requests with clock-relative token counts.

A steady step costs O(requests that need a block or end), not O(requests): counts are offsets from the decode clock
(`DecodeSlot`), and two calendars map clock ticks to the slots that need attention then. An entry of the calendar of
growth is valid only while the slot is live and still has that tick, so leaving or moving a slot need not search it.
The other one has no stale entries: an end may be far away, and a stale entry would keep its request alive until then.
"""

from collections.abc import Iterable

from sageLLM.runtime.scheduler.batch import DecodeStepBatch
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.plan import DecodePlan
from sageLLM.runtime.scheduler.queues import RoundRobinQueue
from sageLLM.runtime.scheduler.request import DecodeClock, DecodeSlot, Request
from sageLLM.runtime.scheduler.roster import Roster

Calendar = dict[int, list[DecodeSlot]]


class DecodeQueue:
    """Requests with a computed (or planned) prompt and their KV on the decode worker, in round-robin order."""

    def __init__(self, block_size: int, limits: SequenceLimits) -> None:
        self.requests: RoundRobinQueue[Request] = RoundRobinQueue()
        self.clock = DecodeClock()
        self._block_size = block_size
        self._limits = limits
        self._growth: Calendar = {}
        self._ends: dict[int, dict[DecodeSlot, None]] = {}  # of live slots
        self._has_rolled_back = False  # stale entries can be valid again, next to newer ones of the same tick
        self._num_joined = 0
        # Of all requests. None: the round robin has changed their order.
        self._roster: Roster | None = Roster(())

    # --- membership ---

    def join(self, request: Request, pending: Iterable[DecodePlan]) -> None:
        """Add a request with complete KV. The pending decode steps advance the clock but not this request."""
        num_tokens = request.num_computed_tokens
        slot = self._add(request, num_tokens, self._limits.num_decodes_left(request))
        slot.computed_offset = num_tokens - self.clock.committed
        for plan in pending:  # their commit and roll-back move the clock, so they must correct this slot
            plan.skipped.append(slot)

    def join_ahead(self, request: Request, later: Iterable[DecodePlan] = ()) -> None:
        """Add a request with its last prefill chunk in a pending step; `later` are the decodes of later steps."""
        # One output less is left: the pending chunk yields the first token.
        slot = self._add(request, request.num_planned_tokens, self._limits.num_decodes_left(request) - 1)
        for plan in later:
            plan.skipped.append(slot)

    def _add(self, request: Request, num_tokens: int, num_left: int) -> DecodeSlot:
        slot = DecodeSlot(request, self.clock, num_tokens, self._num_joined)
        self._num_joined += 1
        request.slot = slot
        self.requests.append(request)
        if self._roster is not None:
            self._roster.append(slot)
        self.note_growth(slot)
        self._note_end(slot, self.clock.planned + max(1, num_left))
        return slot

    def commit_prefill(self, slot: DecodeSlot, num_tokens: int) -> None:
        """Commit the prefill of a request that joined ahead."""
        slot.computed_offset = num_tokens - self.clock.committed

    def leave(self, request: Request) -> None:
        """Remove a request. Its entry for growth dies with its slot."""
        slot = request.slot
        assert slot is not None, f"{request.request_id!r} does not decode"
        self.requests.remove(request)
        if self._roster is not None:
            self._roster.remove(slot)
        self._forget_end(slot)
        request.leave_slot()

    # --- growth ---

    def has_room(self, slot: DecodeSlot) -> bool:
        """Whether the blocks of the request hold its next token."""
        return slot.planned_offset + self.clock.planned < len(slot.request.kv_block_ids) * self._block_size

    def note_growth(self, slot: DecodeSlot) -> None:
        """Enter the tick at which the request's blocks are full."""
        due = len(slot.request.kv_block_ids) * self._block_size - slot.planned_offset
        slot.growth_tick = max(due, self.clock.planned)  # a tick of the past would never be popped
        self._growth.setdefault(slot.growth_tick, []).append(slot)

    def grow(self, slots: list[DecodeSlot], blocks: list[int], announced: dict[str, list[int]]) -> None:
        """Append one block to the table of each of these full requests, and enter their next growth.

        The blocks are added to those `announced` for each request.
        """
        tick = self.clock.planned + self._block_size
        self._growth.setdefault(tick, []).extend(slots)
        for slot, block in zip(slots, blocks, strict=True):
            slot.growth_tick = tick
            request = slot.request
            request.kv_block_ids.append(block)
            if request.request_id in announced:  # by a step that was rolled back
                announced[request.request_id].append(block)
            else:
                announced[request.request_id] = [block]

    def pop_due(self) -> list[DecodeSlot]:
        """Remove and return the calendar entries of this tick, stale ones included."""
        return self._growth.pop(self.clock.planned, [])

    def pop_full(self, skipped: dict[str, DecodeSlot]) -> list[DecodeSlot]:
        """The slots that need a block for this step's token, except those that the step skips."""
        tick = self.clock.planned
        if tick not in self._growth:
            return []
        full = [slot for slot in self._growth.pop(tick) if slot.growth_tick == tick and slot.request.slot is slot]
        if self._has_rolled_back:
            full = list(dict.fromkeys(full))
        return [slot for slot in full if slot.request.request_id not in skipped] if skipped else full

    def num_blocks_due(self, num_steps: int) -> int:
        """Blocks that the requests need for their next `num_steps` unplanned tokens."""
        rounds, rest = divmod(num_steps, self._block_size)
        ticks = range(self.clock.planned, self.clock.planned + rest)
        entries = [(slot, tick) for tick in ticks for slot in self._growth.get(tick, ())]
        return rounds * len(self.requests) + sum(slot.growth_tick == tick and slot.is_live for slot, tick in entries)

    # --- the clock ---

    def ending(self) -> dict[str, DecodeSlot]:
        """The slots of requests with their last token in a pending step, or the last one before a recomputation."""
        return {slot.request.request_id: slot for slot in self._ends.get(self.clock.planned, ())}

    def _note_end(self, slot: DecodeSlot, tick: int) -> None:
        slot.end_tick = tick
        self._ends.setdefault(tick, {})[slot] = None

    def _forget_end(self, slot: DecodeSlot) -> None:
        slots = self._ends.get(slot.end_tick)
        if slots is not None:
            slots.pop(slot, None)
            if not slots:
                del self._ends[slot.end_tick]

    def advance(self, skipped: dict[str, DecodeSlot]) -> DecodePlan | None:
        """Decode all requests but the skipped ones and advance the clock; skipped slots move back by one."""
        roster = self._roster
        if roster is None:
            roster = self._roster = self._rebuilt_roster()
        requests, offsets = roster.share(list(skipped.values())) if skipped else roster.share()
        return self._advance(requests, offsets, skipped)

    def advance_round(self, served: list[Request], skipped: dict[str, DecodeSlot]) -> DecodePlan | None:
        """Decode the served requests, which move to the back of the queue, and advance the clock."""
        self._roster = None
        offsets = [request.slot.planned_offset for request in served if request.slot is not None]
        plan = self._advance(served, offsets, skipped)
        if plan is not None:
            plan.served = served
            for request in served:
                self.requests.to_back(request)
        return plan

    def _advance(
        self, requests: list[Request], offsets: list[int], skipped: dict[str, DecodeSlot]
    ) -> DecodePlan | None:
        plan = None
        if requests:
            plan = DecodePlan(DecodeStepBatch(0, requests, offsets, self.clock.planned), list(skipped.values()))
            self.clock.planned += 1
        for slot in skipped.values():
            if requests:
                slot.planned_offset -= 1
                if self._roster is not None:
                    self._roster.move_back(slot)
            if requests or slot.growth_tick <= self.clock.planned:  # or its entry was taken out for this step
                self.note_growth(slot)
        return plan

    def _rebuilt_roster(self) -> Roster:
        slots = [request.slot for request in self.requests if request.slot is not None]
        for slot in slots:
            slot.number = self._num_joined
            self._num_joined += 1
        return Roster(slots)

    def commit(self, plan: DecodePlan) -> list[Request]:
        """Count the step's tokens as computed; returns the requests that may be complete or have outgrown their KV."""
        tick = self.clock.committed = self.clock.committed + 1
        for slot in plan.skipped:
            if slot.computed_offset is not None:
                slot.computed_offset -= 1
        slots = self._ends.pop(tick, None)
        if slots is None:
            return []
        for slot in slots:  # those that turn out not to be complete are checked again
            self._note_end(slot, tick + max(1, self._limits.num_decodes_left(slot.request)))
        return [slot.request for slot in slots]

    def roll_back(self, plan: DecodePlan) -> None:
        """Undo the decodes of the newest pending step."""
        self.clock.planned -= 1
        self._has_rolled_back = True
        self._roster = None
        for slot in plan.skipped:
            slot.planned_offset += 1
            if slot.is_live:
                self.note_growth(slot)
        self.requests.to_front(plan.served)

    def check_integrity(self) -> None:
        """Check that each request has one valid entry in each calendar, at the right tick."""
        for request in self.requests:
            slot = request.slot
            assert slot is not None, f"{request.request_id!r} must have a slot"
            due = max(self.clock.planned, len(request.kv_block_ids) * self._block_size - slot.planned_offset)
            assert slot.growth_tick == due, f"{request.request_id!r} grows at tick {slot.growth_tick} instead of {due}"
            num_entries = self._growth.get(due, []).count(slot)
            assert num_entries == 1 or (num_entries and self._has_rolled_back), (
                f"{request.request_id!r} has {num_entries} entries for its growth"
            )
            assert slot in self._ends[slot.end_tick], f"{request.request_id!r} misses its entry for the end"
        num_ends = sum(map(len, self._ends.values()))
        assert num_ends == len(self.requests), f"{num_ends} entries for ends of {len(self.requests)} requests"
        if self._roster is not None:
            self._roster.check_integrity(self.requests)
