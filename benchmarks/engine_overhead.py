"""Measures what the engine adds to the kernels: time per decode step outside the plan.

    python benchmarks/engine_overhead.py [--steps N]

A step is timed as a whole, and inside it the plan, which is one native call list; the difference is scheduling, input
tensors, the choice of tokens and their text. The model is small enough that the overhead is not lost in noise.
"""

import argparse
import statistics
import time
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
    for name, value in measure(parser.parse_args().steps).items():
        print(f"{name:<40} {value}")


def measure(steps: int) -> dict[str, Any]:
    """Medians in microseconds per decode step, at batch 1 and 32."""
    results: dict[str, Any] = {}
    for batch in (1, 32):
        total, inside = _time_steps(batch, steps)
        results[f"step_us_batch_{batch}"] = round(total)
        results[f"outside_plan_us_batch_{batch}"] = round(total - inside)
    return results


def _time_steps(batch: int, steps: int) -> tuple[float, float]:
    llm = LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode="time_share"))
    clock = PlanClock(llm.engine.executor.decoder.runner)
    params = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        llm.engine.add(str(i), None, [5 + i, 7, 11], params)
    for _ in range(5):
        llm.engine.step()
    totals, insides = [], []
    for _ in range(steps):
        clock.seconds = 0.0
        start = time.perf_counter()
        llm.engine.step(only_finished=True)
        totals.append(1e6 * (time.perf_counter() - start))
        insides.append(1e6 * clock.seconds)
    return statistics.median(totals), statistics.median(insides)


class PlanClock:
    """Stand-in for a worker's decode plan that sums the time spent in it."""

    def __init__(self, runner: ModelRunner) -> None:
        self.seconds = 0.0
        self._plan = runner.plan("decode")
        runner.plan = lambda stage, num_ubatches=1, of=runner.plan: (
            self if stage == "decode" else of(stage, num_ubatches)
        )

    def run(self, inputs: Inputs) -> list[Tensor]:
        start = time.perf_counter()
        outputs = self._plan.run(inputs)
        self.seconds += time.perf_counter() - start
        return outputs


if __name__ == "__main__":
    main()
