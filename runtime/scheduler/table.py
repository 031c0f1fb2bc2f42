"""Request table of the PD scheduler: the live requests by state."""

from sageLLM.runtime.scheduler.forks import ForkTable
from sageLLM.runtime.scheduler.queues import WaitingQueue
from sageLLM.runtime.scheduler.request import Request


class RequestTable:
    """Live requests by state, and ended ones with blocks in use.

    - `waiting`: without KV, by rank. `preempted` is the part of them that lost their KV or have it in a tier;
      `received` are the ids of those with KV from elsewhere (`add_received`).
    - `forks`: waiting for the prefill of their parent.
    - `running`: with KV. `prefilling` is the part of them with prompt tokens to compute; the others migrate
      (`Migration`) or decode (`DecodeQueue`).
    - `outgrown`: decoding requests that may have outgrown `SequenceLimits.switch_len` since the last step.
    - `prefilled`: with a complete prefill, on a prefill worker that keeps the KV until it is on a decode worker.
    - `reserved`: requests of other schedulers that have blocks here, into which their KV is copied.
    - `pinned`: ids of requests with KV that a copy to another worker reads; `borrowed`: ids of tables without a
      request, for prefixes that are copied from or to another worker.
    - `pending_free`: ended, with the last step that may touch their blocks. A block that were reused earlier could be
      overwritten by that step, or by a copy in flight, after its new owner wrote it.
    """

    def __init__(self, waiting: WaitingQueue, running: dict[str, Request], preempted: dict[str, Request]) -> None:
        self.waiting = waiting
        self.running = running
        self.preempted = preempted
        self.received: set[str] = set()
        self.forks = ForkTable()
        self.prefilling: dict[str, Request] = {}
        self.prefilled: dict[str, Request] = {}
        self.reserved: dict[str, Request] = {}
        self.pinned: set[str] = set()
        self.borrowed: set[str] = set()
        self.holds_prefilled = False
        self.outgrown: dict[str, Request] = {}
        self.pending_free: dict[str, tuple[Request, int]] = {}

    def find(self, request_id: str) -> Request | None:
        """The live request with this id."""
        running = self.running.get(request_id)
        return running or self.waiting.get(request_id) or self.forks.get(request_id)
