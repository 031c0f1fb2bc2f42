"""Stages of a pipeline-parallel worker: several steps in flight, in order."""

from collections.abc import Sequence

WHOLE = (1.0,)
"""The shares of a worker that is not a pipeline."""


def equal_shares(num_stages: int) -> tuple[float, ...]:
    """Stages that take equal parts of the time of a step."""
    return (1 / num_stages,) * num_stages


class Stages:
    """Occupation of stages; each takes its share of the time of a step in all of them together.

    A step passes through all stages, so alone it takes as long as on one device; the next step starts as soon as the
    first stage is free, and waits wherever the step before it is still in a stage.
    """

    def __init__(self, shares: Sequence[float] = WHOLE) -> None:
        self._shares = shares
        self._free_s = [0.0] * len(shares)

    @property
    def free_s(self) -> float:
        """Time from which the first stage is free."""
        return self._free_s[0]

    def start(self, now_s: float, duration_s: float) -> float:
        """Starts a step that takes `duration_s` in all stages together; returns the time of its end."""
        end_s = now_s
        for stage, share in enumerate(self._shares):
            end_s = max(end_s, self._free_s[stage]) + share * duration_s
            self._free_s[stage] = end_s
        return end_s
