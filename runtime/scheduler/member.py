"""A worker of a group, as the scheduler of the group sees it: its own scheduler, its role, and its load."""

from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.runtime.kv.hash_chain import HashChain
from sageLLM.runtime.scheduler.handover import Handover
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.scheduler.request import Request


class WorkerStatus(NamedTuple):
    """A worker in a report: `state` is "running", "restarting", or "draining" before a change of its role."""

    number: int
    role: Role
    state: str
    epoch: int
    num_requests: int
    num_blocks_used: int


@dataclass(slots=True, eq=False)
class Member:
    """One worker of a group. `epoch` counts its starts; `next_role` is set while it drains for another role.

    `queued` maps the requests that it prefills to their uncached tokens.
    """

    number: int
    scheduler: PDScheduler
    num_ranks: int = 1
    epoch: int = 0
    is_up: bool = True
    next_role: Role | None = None
    queued: dict[str, int] = field(default_factory=dict)
    num_queued_tokens: int = 0

    @property
    def role(self) -> Role:
        assert self.scheduler.role is not None, "a member has one role"
        return self.scheduler.role

    @property
    def handover(self) -> Handover:
        return self.scheduler.handover

    @property
    def accepts(self) -> bool:
        """Whether it takes new requests."""
        return self.is_up and self.next_role is None

    @property
    def block_size(self) -> int:
        return self.scheduler.kv.block_size

    @property
    def num_requests(self) -> int:
        """Its requests, waiting, running and expected."""
        return self.scheduler.get_num_waiting() + self.scheduler.get_num_running() + self.handover.num_reserved

    def blocks_of(self, name: str, start: int, num_tokens: int) -> list[int]:
        """The blocks with these tokens of a request."""
        size = self.block_size
        return self.handover.blocks_of(name)[start // size : -(-(start + num_tokens) // size)]

    # --- placement ---

    def num_cached_tokens(self, request: Request) -> int:
        """The leading tokens of a request with KV here."""
        chain = HashChain(self.block_size, request.prompt_token_ids, request.output_token_ids, request.kv_salt)
        return self.handover.num_cached_tokens(chain)

    def prefill_cost(self, request: Request) -> int:
        """Tokens to compute until the prompt of a request is complete here."""
        return self.num_queued_tokens + request.total_tokens - self.num_cached_tokens(request)

    def decode_cost(self, request: Request) -> int:
        """Tokens that the decodes here hold, and tokens of the request to send."""
        used = self.scheduler.kv.decode.pool.num_used * self.block_size
        return used + request.total_tokens - self.num_cached_tokens(request)

    def enqueue(self, request: Request) -> None:
        """Queues a request for prefill."""
        self.scheduler.add_request(request)
        num_tokens = request.total_tokens - self.num_cached_tokens(request)
        self.queued[request.request_id] = num_tokens
        self.num_queued_tokens += num_tokens

    def dequeue(self, request_id: str) -> None:
        """The request is not prefilled here any more."""
        self.num_queued_tokens -= self.queued.pop(request_id, 0)

    # --- report ---

    def status(self) -> WorkerStatus:
        state = "running" if self.is_up else "restarting"
        if self.is_up and self.next_role is not None:
            state = "draining"
        used = self.scheduler.kv.decode.pool.num_used
        return WorkerStatus(self.number, self.role, state, self.epoch, self.num_requests, used)
