"""How a step of `auto` mode is run: what is chosen, and who chooses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from sageLLM.runtime.scheduler.request import Request

if TYPE_CHECKING:
    from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """Run the step as in this mode, with at most `max_prefill_tokens` of prefill (None: what the config says).

    "prefill" lets the decodes wait, unless no prompt can be computed.
    """

    mode: Literal["time_share", "hybrid", "prefill"]
    max_prefill_tokens: int | None = None


class ModeChooser(Protocol):
    """Chooses the mode of each step; it reads the scheduler and changes nothing."""

    def observe(self, request: Request) -> None:
        """A request has been queued."""
        ...

    def choose(self, scheduler: "PDScheduler") -> ModeChoice: ...
