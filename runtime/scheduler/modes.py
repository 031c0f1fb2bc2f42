"""How a step of `auto` mode is run: what is chosen, and who chooses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """Run the step as in this mode, with at most `max_prefill_tokens` of prefill (None: what the config says)."""

    mode: Literal["time_share", "hybrid"]
    max_prefill_tokens: int | None = None


class ModeChooser(Protocol):
    """Chooses the mode of each step; it reads the scheduler and changes nothing."""

    def choose(self, scheduler: "PDScheduler") -> ModeChoice: ...
