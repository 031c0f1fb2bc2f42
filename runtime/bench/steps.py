"""Measures whole steps of a checkpoint in the engine, and compares them with the prediction of a hardware entry."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork

CHUNK = 512
CONTEXT = 256
NUM_DECODES = 16
PROMPTS = (256, 1024)
NUM_STEPS = 24
"""Decode steps that are timed; the median counts."""


@dataclass(frozen=True, slots=True)
class StepError:
    """A kind of step: median of the measured seconds, their spread (10th and 90th percentile), and the prediction."""

    step: str
    measured_s: float
    least_s: float
    most_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Predicted / measured - 1."""
        return self.predicted_s / self.measured_s - 1

    def as_data(self) -> dict[str, Any]:
        """For JSON, in milliseconds."""
        times = {
            name: round(getattr(self, f"{name}_s") * 1e3, 3) for name in ("measured", "least", "most", "predicted")
        }
        return {
            "step": self.step,
            **{f"{name}_ms": value for name, value in times.items()},
            "error": round(self.error, 4),
        }


class StepTimer:
    """Times steps of an `LLM`, with nothing else running in it."""

    def __init__(self, model: Path, hardware: Hardware, rounds: int = 5, **options: Any) -> None:
        """`options` are those of `LLM`. Every prompt is one step."""
        options.setdefault("scheduler", PDSchedulerConfig(mode="hybrid", prefill_chunk_size=4096))
        self._llm = llm = LLM(model, skip_tokenizer=True, enable_prefix_caching=False, **options)
        needed = max(*PROMPTS, CHUNK, CONTEXT) + 2 * NUM_STEPS
        if llm.model.max_model_len < needed:
            raise SageError(f"max_model_len must be at least {needed} to time steps, got {llm.model.max_model_len}")
        tp = options.get("tensor_parallel_size", 1)
        model_config, layout, dtype = llm.model.config, llm.model.layout, llm.model.short_dtype
        form = llm.model.kv_form
        self._cost = RooflineStepCost(
            layout, model_config, hardware, dtype=dtype, tensor_parallel_size=tp, kv_form=form
        )
        self._rounds = rounds
        self._ids = itertools.count()

    def errors(self) -> Iterator[StepError]:
        """Decodes of one and of NUM_DECODES requests, prompts alone, a chunk next to decodes."""
        for num in (1, NUM_DECODES):
            yield self._error(f"decode, {num} at {CONTEXT}", partial(self._decode, num), _decodes(num))
        for length in PROMPTS:
            work = StepWork((PromptChunk(0, length),))
            yield self._error(f"prefill of {length}", partial(self._prefill, length), work)
        mixed = StepWork((PromptChunk(0, CHUNK),), NUM_DECODES, _decodes(NUM_DECODES).num_context_tokens)
        yield self._error(f"{NUM_DECODES} decodes + chunk of {CHUNK}", self._mixed, mixed)

    def _error(self, name: str, measure: Callable[[], list[float]], work: StepWork) -> StepError:
        measure()  # plans the graph, grows the arena
        times = sorted(itertools.chain.from_iterable(measure() for _ in range(self._rounds)))
        low, high = times[len(times) // 10], times[-1 - len(times) // 10]
        return StepError(name, statistics.median(times), low, high, self._cost.step_s(work))

    def _decode(self, num: int) -> list[float]:
        """Seconds of decode steps with contexts of about CONTEXT tokens."""
        for _ in range(num):
            self._add(CONTEXT - NUM_STEPS // 2, NUM_STEPS + 4)
        times = self._step_times()
        return times[-NUM_STEPS - 1 : -1]

    def _prefill(self, length: int) -> list[float]:
        """Seconds from a prompt to its token, which is one step."""
        self._add(length, 1)
        start = perf_counter()
        self._step_times()
        return [perf_counter() - start]

    def _mixed(self) -> list[float]:
        """Seconds of the step that computes a prompt of CHUNK tokens next to NUM_DECODES decodes: the longest step."""
        for _ in range(NUM_DECODES):
            self._add(CONTEXT, 12)
        times = []
        while self._llm.engine.has_work:
            start = perf_counter()
            self._llm.engine.step()
            times.append(perf_counter() - start)
            if len(times) == 5:
                self._add(CHUNK, 1)
        return [max(times[5:])]

    def _add(self, length: int, num_new: int) -> None:
        number = next(self._ids)
        ids = [(11 * i + 7 * number) % (self._llm.model.config.V - 10) + 5 for i in range(length)]
        params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
        self._llm.engine.add(f"step-{number}", None, ids, params)

    def _step_times(self) -> list[float]:
        times = []
        while self._llm.engine.has_work:
            start = perf_counter()
            self._llm.engine.step()
            times.append(perf_counter() - start)
        return times


def _decodes(num: int) -> StepWork:
    return StepWork((), num, num * CONTEXT)


def as_table(errors: Sequence[StepError]) -> str:
    """A line per kind of step."""
    lines = [f"{'step':32}{'measured':>10}{'p10':>8}{'p90':>8}{'predicted':>11}{'error':>8}   ms"]
    for one in errors:
        measured = f"{one.measured_s * 1e3:>10.2f}{one.least_s * 1e3:>8.2f}{one.most_s * 1e3:>8.2f}"
        lines.append(f"{one.step:32}{measured}{one.predicted_s * 1e3:>11.2f}{one.error:>+8.0%}")
    return "\n".join(lines)
