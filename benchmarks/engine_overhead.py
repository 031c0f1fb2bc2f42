"""Measures what the engine adds to the kernels: time per decode step outside the plan.

    python benchmarks/engine_overhead.py [--steps N] [--processor-time]

A step is timed as a whole, and inside it the plan, which is one native call list; the difference is scheduling, input
tensors, the choice of tokens and their text. The model is small enough that the overhead is not lost in noise.
With `--processor-time` engine and worker share one thread, whose processor time counts: all Python of a step, whether
or not it delays one. The 10th percentile of the steps says what they take when other programs leave the caches alone.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.step_inputs import Inputs

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny_python_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processor-time", action="store_true", help="of all Python, in one thread")
    options = parser.parse_args()
    figures = measure_processor_time if options.processor_time else measure
    for name, value in figures(options.steps).items():
        print(f"{name:<40} {value}")


def measure(steps: int) -> dict[str, Any]:
    """Medians in microseconds per decode step, at batch 1 and 32."""
    results: dict[str, Any] = {}
    for batch in (1, 32):
        totals, insides = _time_steps(batch, steps, time.perf_counter)
        total, inside = statistics.median(totals), statistics.median(insides)
        results[f"step_us_batch_{batch}"] = round(total)
        results[f"outside_plan_us_batch_{batch}"] = round(total - inside)
    return results


def measure_processor_time(steps: int) -> dict[str, Any]:
    """Microseconds of processor time per decode step, without the plan: 10th percentile and median."""
    results: dict[str, Any] = {}
    for batch in (1, 32):
        totals, insides = _time_steps(batch, steps, time.thread_time, in_one_thread=True)
        outside = sorted(total - inside for total, inside in zip(totals, insides, strict=True))
        results[f"processor_us_batch_{batch}_p10"] = round(outside[len(outside) // 10], 1)
        results[f"processor_us_batch_{batch}_p50"] = round(statistics.median(outside), 1)
    return results


def _time_steps(
    batch: int, steps: int, now: Callable[[], float], *, in_one_thread: bool = False
) -> tuple[list[float], list[float]]:
    """The microseconds of each step, and of its plan, by the clock `now`."""
    config = PDSchedulerConfig(mode="time_share")
    llm = LLM(MODEL, dtype="float32", async_scheduling=not in_one_thread, scheduler=config)
    clock = PlanClock(llm.engine.executor.decoder.runner, now)
    params = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        llm.engine.add(str(i), None, [5 + i, 7, 11], params)
    for _ in range(5):
        llm.engine.step()
    totals, insides = [], []
    for _ in range(steps):
        clock.seconds = 0.0
        start = now()
        llm.engine.step(only_finished=True)
        totals.append(1e6 * (now() - start))
        insides.append(1e6 * clock.seconds)
    llm.close()
    return totals, insides


class PlanClock:
    """Stand-in for a worker's decode plan that sums the time spent in it, by the clock `now`."""

    def __init__(self, runner: ModelRunner, now: Callable[[], float]) -> None:
        self.seconds, self._now = 0.0, now
        self._plan = runner.plan("decode")
        runner.plan = lambda stage, num_ubatches=1, of=runner.plan: (
            self if stage == "decode" else of(stage, num_ubatches)
        )

    def run(self, inputs: Inputs) -> list[Tensor]:
        start = self._now()
        outputs = self._plan.run(inputs)
        self.seconds += self._now() - start
        return outputs


if __name__ == "__main__":
    main()
