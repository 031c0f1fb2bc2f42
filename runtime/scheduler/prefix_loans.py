"""Prefixes that a prefill worker reads back from a decode worker, such as the earlier turns of a conversation.

The answer of a turn has its KV on the decode worker. When the next turn arrives, the full blocks that only a decode
worker has are copied to the prefix cache of the prefill worker, by a transfer as any other, in the opposite direction.
Until it has ended the request waits; if it fails, the prefix is computed.
"""

from collections.abc import Sequence
from itertools import count

from sageLLM.runtime.scheduler.member import Member
from sageLLM.runtime.scheduler.migration import Migration
from sageLLM.runtime.scheduler.request import Request

MIN_TOKENS = 64
"""A shorter prefix is computed rather than read back."""


class PrefixLoans:
    """The prefixes that are being read back, by the names of their transfers."""

    def __init__(self, ends: dict[str, tuple[Member, Member]], migration: Migration) -> None:
        self._ends, self._migration = ends, migration
        self._waiting: dict[str, str] = {}  # the request of each loan that it waits for
        self._tried: set[str] = set()
        self._names = count()
        self._live: set[str] = set()

    def is_loan(self, name: str) -> bool:
        return name in self._live

    def is_waiting(self, request_id: str) -> bool:
        """Whether a request waits for a prefix."""
        return request_id in self._waiting.values()

    def begin(self, request: Request, borrower: Member, lenders: Sequence[Member]) -> bool:
        """Start to read back what a lender has and the borrower has not; false if that is not worth it."""
        if request.request_id in self._tried or not lenders:
            self._tried.discard(request.request_id)
            return False
        lender = max(lenders, key=lambda member: member.num_cached_tokens(request))
        num_tokens = lender.num_cached_tokens(request)
        if num_tokens - borrower.num_cached_tokens(request) < MIN_TOKENS:
            return False
        name = f"{request.request_id} prefix {next(self._names)}"
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        present = borrower.handover.borrow(name, tokens[:num_tokens], request.kv_salt)
        if present is None:
            return False
        lender.handover.lend(name, tokens[: num_tokens + 1], request.kv_salt)
        self._ends[name] = lender, borrower
        self._live.add(name)
        self._waiting[name] = request.request_id
        self._tried.add(request.request_id)
        loan = Request(name, tokens[:num_tokens], num_computed_tokens=num_tokens, arrival_time=request.arrival_time)
        self._migration.admit(loan, present, borrower.num_ranks)
        self._migration.note_computed(loan, is_last=True)
        return True

    def of(self, request_id: str) -> list[str]:
        """The loans that a request waits for."""
        return [name for name, waiting in self._waiting.items() if waiting == request_id]

    def finish(self, name: str) -> None:
        """The request of a loan waits no longer."""
        self._waiting.pop(name, None)

    def release(self, name: str, lender: Member, borrower: Member, num_arrived: int = 0) -> None:
        """End a loan of which nothing is being copied."""
        self.finish(name)
        self._live.discard(name)
        lender.handover.end_loan(name)
        borrower.handover.end_loan(name, num_arrived)
