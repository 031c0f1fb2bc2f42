"""Time that a step takes besides the kernels: the host's, and transfers between the stages of a pipeline."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sageLLM.runtime.scheduler.step_cost import StepCostModel, StepWork


@dataclass(frozen=True, slots=True)
class HostTime:
    """Seconds for which the device waits for the host in every step, and for each request of the step.

    Both are 0 if the host plans a step while the device computes the previous one.
    """

    step_s: float = 0.0
    request_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.step_s < math.inf and 0 <= self.request_s < math.inf):
            raise ValueError(f"the time of the host must be finite seconds, got {self.step_s} and {self.request_s}")

    def __call__(self, work: StepWork) -> float:
        return self.step_s + self.request_s * (work.num_decodes + len(work.prefill))


class AddedCost:
    """A cost model with additional times, which count in every step with work."""

    def __init__(self, cost: StepCostModel, extras: Sequence[Callable[[StepWork], float]]) -> None:
        self._cost = cost
        self._extras = extras

    def step_s(self, work: StepWork) -> float:
        """Seconds of a step with this work; 0 without work."""
        if not work.num_tokens:
            return 0.0
        return self._cost.step_s(work) + sum(extra(work) for extra in self._extras)
