"""Scheduling modes: each decides which phases a step runs, and with which budgets.

A mode sees the step's context (`StepPlan.is_ahead`, `num_consecutive_decodes`, `role`) and asks the phases whether they
have work; it changes nothing but the step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.scheduler.decode import DecodePhase
from sageLLM.runtime.scheduler.plan import Role, StepPlan
from sageLLM.runtime.scheduler.prefill import PrefillPhase
from sageLLM.runtime.scheduler.request import Request

ChoiceName = Literal["time_share", "hybrid", "prefill"]


class Mode(Protocol):
    """Fills a step with prefills and decodes. `max_prefill_tokens` lowers the configured budget."""

    def fill(self, step: StepPlan, max_prefill_tokens: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Phases:
    """The two phases, with the budgets that the modes have in common."""

    config: PDSchedulerConfig
    prefill: PrefillPhase
    decode: DecodePhase

    def add_prefills(self, step: StepPlan, max_tokens: int | None = None) -> None:
        """Add prefill chunks of up to `max_tokens` tokens, at most `max_prefill_tokens`."""
        most = self.config.max_prefill_tokens
        self.prefill.add_to(
            step, most if max_tokens is None else min(most, max_tokens), self.config.max_prefill_batch_size
        )

    def add_decodes(self, step: StepPlan) -> None:
        """Add decodes up to the configured batch size."""
        self.decode.add_to(step, self.config.max_decodes)


class TimeShare:
    """One worker; a step is either prefill or decode. Decodes are preferred, up to `max_consecutive_decodes` steps."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    def fill(self, step: StepPlan, max_prefill_tokens: int | None = None) -> None:
        phases = self._phases
        is_prefill_due = step.num_consecutive_decodes >= phases.config.max_consecutive_decodes
        if phases.decode.has_work() and not (is_prefill_due and phases.prefill.has_work()):
            phases.add_decodes(step)
        if step.decode is None:  # no decodes, a prefill was due, or all decodes were preempted
            phases.add_prefills(step, max_prefill_tokens)


class Hybrid:
    """One worker; a step holds the decodes and prefill chunks under one token budget (Sarathi-Serve)."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    def fill(self, step: StepPlan, max_prefill_tokens: int | None = None) -> None:
        phases, config = self._phases, self._phases.config
        chunk_size = config.prefill_chunk_size if max_prefill_tokens is None else max_prefill_tokens
        budget = config.max_prefill_tokens
        # Decodes come first, but leave tokens for a prefill that can run: neither starves the other. If all decodes fit
        # beside it, nobody needs to know whether there is one.
        kept_for_prefill = min(chunk_size, budget // 2)
        if phases.decode.num_requests > budget - kept_for_prefill and not phases.prefill.has_work():
            kept_for_prefill = 0
        phases.decode.add_to(step, min(config.max_decodes, budget - kept_for_prefill))
        phases.add_prefills(step, min(chunk_size, budget - step.num_decodes))


class PrefillFirst:
    """One worker; decodes run only when no prompt can be computed."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    def fill(self, step: StepPlan, max_prefill_tokens: int | None = None) -> None:
        self._phases.add_prefills(step, max_prefill_tokens)
        if not step.prefill:
            self._phases.add_decodes(step)


class Strict:
    """Two workers; each runs its phase, in the same step or (with a role) in steps of one worker."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases

    def fill(self, step: StepPlan, max_prefill_tokens: int | None = None) -> None:
        if step.role != "prefill":
            self._phases.add_decodes(step)
        if step.role != "decode":
            self._phases.add_prefills(step, max_prefill_tokens)


class OneRole:
    """A worker of one role in a group of workers, each with its scheduler: it only prefills, or only decodes."""

    def __init__(self, phases: Phases, role: Role) -> None:
        self._phases, self._role = phases, role

    def fill(self, step: StepPlan, max_prefill_tokens: int | None = None) -> None:
        if self._role == "prefill":
            self._phases.add_prefills(step, max_prefill_tokens)
        else:
            self._phases.add_decodes(step)


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """Mode of one step, with at most `max_prefill_tokens` tokens of prefill (None: as configured).

    "prefill" delays the decodes as long as prompts can be computed.
    """

    mode: ChoiceName
    max_prefill_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SchedulerView:
    """Read-only view of the scheduler for mode choosers; `clock` is that of the requests' times."""

    config: PDSchedulerConfig
    max_batch_size: int
    max_kv_tokens: int | None
    clock: Callable[[], float]


class ModeChooser(Protocol):
    """Chooses the mode of each step of mode `auto`."""

    def observe(self, request: Request) -> None:
        """A request was queued."""
        ...

    def choose(self, view: SchedulerView) -> ModeChoice:
        """The mode of the next step."""
        ...


class Auto:
    """One worker; a chooser selects the mode of every step."""

    def __init__(self, modes: Mapping[ChoiceName, Mode], chooser: ModeChooser, view: SchedulerView) -> None:
        self._modes = modes
        self._chooser = chooser
        self._view = view

    def fill(self, step: StepPlan, max_prefill_tokens: int | None = None) -> None:
        choice = self._chooser.choose(self._view)
        self._modes[choice.mode].fill(step, choice.max_prefill_tokens)


def make_mode(phases: Phases, chooser: ModeChooser | None, view: SchedulerView) -> Mode:
    """Returns the mode that the config names."""
    name = phases.config.mode
    if (name == "auto") != (chooser is not None):
        raise ValueError("mode_chooser must be passed with mode 'auto', and only then")
    if chooser is not None:
        modes: dict[ChoiceName, Mode] = {
            "time_share": TimeShare(phases),
            "hybrid": Hybrid(phases),
            "prefill": PrefillFirst(phases),
        }
        return Auto(modes, chooser, view)
    match name:
        case "strict":
            return Strict(phases)
        case "hybrid":
            return Hybrid(phases)
    return TimeShare(phases)
