"""Cost model of one step, for the scheduler and the simulator: seconds as a function of the step's work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class PromptChunk(NamedTuple):
    """`num_tokens` tokens of a prompt; the KV of the `start` tokens before them is in the cache."""

    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """Work of a step: prompt chunks, and one token for each of `num_decodes` requests.

    `num_context_tokens` is the sum, over the decodes, of the tokens that each attends to (itself included).
    """

    prefill: Sequence[PromptChunk] = ()
    num_decodes: int = 0
    num_context_tokens: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.prefill)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.num_prompt_tokens + self.num_decodes


class StepCostModel(Protocol):
    """Predicts the duration of a step."""

    def step_s(self, work: StepWork) -> float:
        """Seconds that a worker takes for this work; 0 without work."""
        ...


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Coefficients of DistServe's latency fits (Zhong et al., arXiv 2401.09670, appendix A), in milliseconds.

    A batch of prompts of n_i tokens takes `prefill` = (a, b, c): a + b * sum(n_i) + c * sum(n_i^2). A step of k decodes
    over s context tokens takes (a, b, c): a + b * s + c * k, with `small_decode` below `threshold` decodes and
    `large_decode` from `threshold` on. `overhead` = (a, b) is added to every step: a + b * (context tokens of all its
    requests).
    """

    prefill: tuple[float, float, float]
    small_decode: tuple[float, float, float]
    large_decode: tuple[float, float, float]
    threshold: int
    prefill_overhead: tuple[float, float] = (0.0, 0.0)
    decode_overhead: tuple[float, float] = (0.0, 0.0)


class CoefficientCost:
    """Duration of a step from fitted coefficients.

    A chunk inside a prompt costs the increase of the quadratic term from its start to its end. A step of both phases
    reads the weights once, so only the larger of the two constants counts.
    """

    def __init__(self, coefficients: Coefficients) -> None:
        self.coefficients = coefficients

    def step_s(self, work: StepWork) -> float:
        """Seconds that a worker takes for this work; 0 without work."""
        fixed_ms: list[float] = [0.0]
        growing_ms = 0.0
        if work.prefill:
            fixed, growing = self._prefill_ms(work.prefill)
            fixed_ms.append(fixed)
            growing_ms += growing
        if work.num_decodes:
            fixed, growing = self._decode_ms(work.num_decodes, work.num_context_tokens)
            fixed_ms.append(fixed)
            growing_ms += growing
        return (max(fixed_ms) + growing_ms) / 1e3

    def _prefill_ms(self, chunks: Sequence[PromptChunk]) -> tuple[float, float]:
        a, b, c = self.coefficients.prefill
        a_overhead, b_overhead = self.coefficients.prefill_overhead
        growing = 0.0
        for start, num_tokens in chunks:
            end = start + num_tokens
            growing += b * num_tokens + c * (end * end - start * start) + b_overhead * end
        return a + a_overhead, growing

    def _decode_ms(self, num_decodes: int, num_context_tokens: int) -> tuple[float, float]:
        is_small = num_decodes < self.coefficients.threshold
        a, b, c = self.coefficients.small_decode if is_small else self.coefficients.large_decode
        a_overhead, b_overhead = self.coefficients.decode_overhead
        return a + a_overhead, (b + b_overhead) * num_context_tokens + c * num_decodes
