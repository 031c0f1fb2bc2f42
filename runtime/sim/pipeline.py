"""Stages of a pipeline-parallel worker: several steps in flight, in order."""


class Stages:
    """Occupation of `depth` stages with equal shares of the layers.

    A step passes through all stages, so alone it takes as long as on one device; the next step starts as soon as the
    first stage is free, and waits wherever the step before it is still in a stage.
    """

    def __init__(self, depth: int = 1) -> None:
        self._free_s = [0.0] * depth

    @property
    def free_s(self) -> float:
        """Time from which the first stage is free."""
        return self._free_s[0]

    def start(self, now_s: float, duration_s: float) -> float:
        """Starts a step that takes `duration_s` in all stages together; returns the time of its end."""
        stage_s = duration_s / len(self._free_s)
        end_s = now_s
        for stage, free_s in enumerate(self._free_s):
            end_s = max(end_s, free_s) + stage_s
            self._free_s[stage] = end_s
        return end_s
