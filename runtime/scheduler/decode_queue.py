"""Queue of decoding requests with clock-relative token counts.

A steady step costs O(requests that need a block or end), not O(requests): counts are offsets from the decode clock
(`DecodeSlot`), and two calendars map clock ticks to the slots that need attention then. A calendar entry is valid only
while the slot is live and still has that tick, so leaving or moving a slot need not search the calendars.
"""

from collections.abc import Iterable

from sageLLM.runtime.scheduler.batch import DecodeStepBatch
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.plan import DecodePlan
from sageLLM.runtime.scheduler.queues import RoundRobinQueue
from sageLLM.runtime.scheduler.request import DecodeClock, DecodeSlot, Request

Calendar = dict[int, list[DecodeSlot]]
Roster = tuple[list[Request], list[int]]
"""Requests and their offsets from the decode clock."""


class DecodeQueue:
    """Requests with a computed (or planned) prompt and their KV on the decode worker, in round-robin order."""

    def __init__(self, block_size: int, limits: SequenceLimits) -> None:
        self.requests: RoundRobinQueue[Request] = RoundRobinQueue()
        self.clock = DecodeClock()
        self._block_size = block_size
        self._limits = limits
        self._growth: Calendar = {}
        self._ends: Calendar = {}
        self._full_roster: Roster | None = None  # of all requests; None: to be rebuilt

    # --- membership ---

    def join(self, request: Request, pending: Iterable[DecodePlan]) -> None:
        """Add a request with complete KV. The pending decode steps advance the clock but not this request."""
        num_tokens = request.num_computed_tokens
        slot = self._add(request, num_tokens, self._limits.num_decodes_left(request))
        slot.computed_offset = num_tokens - self.clock.committed
        for plan in pending:  # their commit and roll-back move the clock, so they must correct this slot
            plan.skipped.append(slot)

    def join_ahead(self, request: Request) -> None:
        """Add a request with its last prefill chunk in a pending step."""
        # One output less is left: the pending chunk yields the first token.
        self._add(request, request.num_planned_tokens, self._limits.num_decodes_left(request) - 1)

    def _add(self, request: Request, num_tokens: int, num_left: int) -> DecodeSlot:
        slot = DecodeSlot(request, self.clock, num_tokens)
        request.take_slot(slot)
        self.requests.append(request)
        self._full_roster = None
        self.note_growth(slot)
        self._note_end(slot, self.clock.planned + max(1, num_left))
        return slot

    def commit_prefill(self, slot: DecodeSlot, num_tokens: int) -> None:
        """Commit the prefill of a request that joined ahead."""
        slot.computed_offset = num_tokens - self.clock.committed

    def leave(self, request: Request) -> None:
        """Remove a request. Its calendar entries die with its slot."""
        self.requests.remove(request)
        request.leave_slot()
        self._full_roster = None

    # --- growth ---

    def has_room(self, slot: DecodeSlot) -> bool:
        """Whether the blocks of the request hold its next token."""
        return slot.planned_offset + self.clock.planned < len(slot.request.kv_block_ids) * self._block_size

    def note_growth(self, slot: DecodeSlot) -> None:
        """Enter the tick at which the request's blocks are full."""
        due = len(slot.request.kv_block_ids) * self._block_size - slot.planned_offset
        slot.growth_tick = max(due, self.clock.planned)  # a tick of the past would never be popped
        self._growth.setdefault(slot.growth_tick, []).append(slot)

    def enter_growth(self, slots: list[DecodeSlot]) -> int:
        """Enter the next growth of full requests that get one block each; returns its tick, to be set in each slot."""
        tick = self.clock.planned + self._block_size
        self._growth.setdefault(tick, []).extend(slots)
        return tick

    def pop_due(self) -> list[DecodeSlot]:
        """Remove and return the calendar entries of this tick, stale ones included."""
        return self._growth.pop(self.clock.planned, [])

    def pop_full(self, skipped: dict[str, DecodeSlot]) -> list[DecodeSlot]:
        """The slots that need a block for this step's token, except those that the step skips."""
        if self.clock.planned not in self._growth:
            return []
        tick = self.clock.planned
        due = [slot for slot in self._growth.pop(tick) if slot.growth_tick == tick and slot.request.slot is slot]
        if skipped:
            due = [slot for slot in due if slot.request.request_id not in skipped]
        full = [slot for slot in due if not self.has_room(slot)]
        if len(full) < len(due):
            for slot in due:
                if self.has_room(slot):
                    self.note_growth(slot)
        return full

    def num_blocks_due(self, num_steps: int) -> int:
        """Blocks that the requests need for their next `num_steps` unplanned tokens."""
        rounds, rest = divmod(num_steps, self._block_size)
        ticks = range(self.clock.planned, self.clock.planned + rest)
        entries = [(slot, tick) for tick in ticks for slot in self._growth.get(tick, ())]
        return rounds * len(self.requests) + sum(slot.growth_tick == tick and slot.is_live for slot, tick in entries)

    # --- the clock ---

    def ending(self) -> dict[str, DecodeSlot]:
        """The slots of requests with their last token in a pending step, or the last one before a recomputation."""
        tick = self.clock.planned
        return {s.request.request_id: s for s in self._ends.get(tick, ()) if s.is_live and s.end_tick == tick}

    def _note_end(self, slot: DecodeSlot, tick: int) -> None:
        slot.end_tick = tick
        self._ends.setdefault(tick, []).append(slot)

    def roster(self, skipped: dict[str, DecodeSlot]) -> Roster:
        """All requests but the skipped ones."""
        # Always new lists: the batches of earlier steps still refer to the old ones.
        if skipped:
            return roster_of([request for request in self.requests if request.request_id not in skipped])
        if self._full_roster is None:
            self._full_roster = roster_of(list(self.requests))
        return self._full_roster

    def advance(self, roster: Roster, skipped: dict[str, DecodeSlot]) -> DecodePlan | None:
        """Decode the requests of the roster and advance the clock; skipped slots move back by one."""
        requests, offsets = roster
        plan = None
        if requests:
            plan = DecodePlan(DecodeStepBatch(0, requests, offsets, self.clock.planned), list(skipped.values()))
            self.clock.planned += 1
        if skipped:
            for slot in skipped.values():
                if requests:
                    slot.planned_offset -= 1
                self.note_growth(slot)
            self._full_roster = None
        return plan

    def commit(self, plan: DecodePlan) -> list[Request]:
        """Count the step's tokens as computed; returns the requests that may be complete or have outgrown their KV."""
        tick = self.clock.committed = self.clock.committed + 1
        for slot in plan.skipped:
            if slot.computed_offset is not None:
                slot.computed_offset -= 1
        if tick not in self._ends:
            return []
        slots = [slot for slot in self._ends.pop(tick) if slot.is_live and slot.end_tick == tick]
        for slot in slots:  # those that turn out not to be complete are checked again
            self._note_end(slot, tick + max(1, self._limits.num_decodes_left(slot.request)))
        return [slot.request for slot in slots]

    def roll_back(self, plan: DecodePlan) -> None:
        """Undo the decodes of the newest pending step."""
        self.clock.planned -= 1
        self._full_roster = None
        for slot in plan.skipped:
            slot.planned_offset += 1
            if slot.is_live:
                self.note_growth(slot)
        self.requests.to_front(plan.served)


def roster_of(requests: list[Request]) -> Roster:
    """The requests with their offsets from the decode clock."""
    return requests, [request.slot.planned_offset for request in requests if request.slot is not None]
