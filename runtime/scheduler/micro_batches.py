"""Micro-batches of a pipeline: the decodes are divided among as many steps as there are stages."""

from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.request import DecodeSlot, Request
from sageLLM.runtime.scheduler.steps import StepQueue


class MicroBatches:
    """Selects the decodes of a step so that every stage has a step to compute.

    A step needs the tokens of the last step with the same requests, and those are known when that step has passed all
    stages. So it takes a share of the requests, and none that the newest `num_stages - 1` pending steps compute.
    """

    def __init__(self, steps: StepQueue, limits: SequenceLimits, num_stages: int = 1) -> None:
        self.num_stages = num_stages
        self._steps, self._limits = steps, limits

    def max_requests(self, num_requests: int) -> int:
        """The share of a step in `num_requests` decodes. Shares differ by at most one."""
        share, rest = divmod(num_requests, self.num_stages)
        newest = list(self._steps.pending)[1 - self.num_stages :]
        num_larger = sum(step.plan.num_decodes > share for step in newest)
        return max(1, share + (num_larger < rest))

    def skipped(self) -> dict[str, DecodeSlot]:
        """The slots that the next step must not decode: those of the newest steps, and those that end with another."""
        steps = list(self._steps.pending)
        split = max(0, len(steps) - self.num_stages + 1)
        found: dict[str, DecodeSlot] = {}
        for i, step in enumerate(steps):
            for request in step.requests:
                is_computed = request.request_id not in step.void and request.slot is not None
                if is_computed and (i >= split or self._is_ending(request)):
                    assert request.slot is not None, "checked above"
                    found[request.request_id] = request.slot
        return found

    def _is_ending(self, request: Request) -> bool:
        """Whether the token in a pending step is the last one of the request, or the last before a recomputation."""
        return self._limits.num_decodes_left(request) <= 1
