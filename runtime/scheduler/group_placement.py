"""Placement of requests on the workers of a group, and the roles of the workers.

A request is on one worker at a time, or unplaced: it waits for a prefill worker, or for a prefix that is read back.
"""

from collections.abc import Callable, Sequence

from sageLLM.runtime.scheduler.member import Member
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.scheduler.prefix_loans import PrefixLoans
from sageLLM.runtime.scheduler.request import Request


class Placement:
    """The worker of each request (`homes`), the requests without one, and those that have left one since `moves`."""

    def __init__(self, members: Sequence[Member], loans: PrefixLoans) -> None:
        self._members, self._loans = members, loans
        self.homes: dict[str, Member] = {}
        self.unplaced: dict[str, Request] = {}
        self.moves: list[tuple[int, str]] = []
        self.num_read_back = 0

    def accepting(self, role: Role) -> list[Member]:
        """The workers of a role that take new requests."""
        return [member for member in self._members if member.role == role and member.accepts]

    # --- requests ---

    def withdraw_stranded(self) -> None:
        """Take the requests that wait on workers that will not compute them."""
        for member in self._members:
            if member.role == "decode" or not member.accepts:
                self._withdraw(member)

    def _withdraw(self, member: Member) -> None:
        for request in member.handover.stranded():
            member.handover.withdraw(request)
            member.dequeue(request.request_id)
            del self.homes[request.request_id]
            self.moves.append((member.number, request.request_id))
            self.unplaced[request.request_id] = request

    def place(self) -> None:
        """Queue requests on the prefill workers, where they have the least to compute."""
        workers = self.accepting("prefill")
        if not workers:
            return
        for request in sorted(self.unplaced.values(), key=lambda one: one.sequence_number) if self.unplaced else ():
            if self._loans.is_waiting(request.request_id):
                continue
            best = min(workers, key=lambda member: member.prefill_cost(request))
            if self._loans.begin(request, best, self.accepting("decode")):
                self.num_read_back += 1
                continue
            del self.unplaced[request.request_id]
            best.enqueue(request)
            self.homes[request.request_id] = best

    def move(self, request_id: str, source: Member, target: Member) -> None:
        """A request is decoded by another worker than the one that prefilled it."""
        source.dequeue(request_id)
        self.moves.append((source.number, request_id))
        self.homes[request_id] = target

    def leave(self, request_id: str) -> Member | None:
        """A request on a worker has ended; returns the worker."""
        member = self.homes.pop(request_id, None)
        if member is not None:
            member.dequeue(request_id)
        return member

    def check_integrity(self) -> None:
        """Check that each request is on the scheduler of its worker."""
        for request_id, member in self.homes.items():
            live = request_id in member.scheduler.running_requests or request_id in member.scheduler.waiting_queue
            assert live, f"request {request_id!r} is not on its worker"

    # --- roles ---

    def set_role(self, number: int, role: Role) -> None:
        """Let a worker take another role when its requests have left.

        ValueError for an unknown worker, and if its old role had no worker then.
        """
        if not 0 <= number < len(self._members):
            raise ValueError(f"the workers are 0 to {len(self._members) - 1}, got {number}")
        member = self._members[number]
        if role == (member.next_role or member.role):
            return
        left = [one for one in self._members if one is not member and (one.next_role or one.role) == member.role]
        if role != member.role and not left:
            raise ValueError(f"worker {number} must keep its role: it is the only {member.role} worker")
        member.next_role = None if role == member.role else role

    def switch_roles(self, is_copying: Callable[[Member], bool]) -> None:
        """Change the roles of workers without requests and without copies from or to them."""
        for member in self._members:
            if member.next_role is None or not member.is_up or not member.handover.is_drained or is_copying(member):
                continue
            member.scheduler.set_role(member.next_role)
            member.next_role = None
