"""Measures what the engine adds to the kernels: time per decode step outside the plan.

    python benchmarks/engine_overhead.py [--steps N] [--processor-time]

The plan of a step is one native call list. The time from its end to the beginning of the next plan, in the thread of
the worker, is what the engine delays a step by: the choice of tokens, the exchange with the engine's thread, which has
planned the next step meanwhile, and the input tensors. It is given as passed time, and as processor time of that
thread, which other programs change only by taking the caches. The model is small enough that it is not lost in noise.

With `--processor-time` engine and worker share one thread, whose processor time counts: all Python of a step, whether
or not it delays one. The 10th percentile of the steps says what they take when other programs leave the caches alone.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.step_inputs import Inputs

MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny_python_model"
BATCHES = (1, 32)
NUM_FIRST = 5


class Times(NamedTuple):
    """Microseconds: passed, and of the thread's processor."""

    passed: float
    processor: float

    @classmethod
    def now(cls) -> "Times":
        return cls(1e6 * time.perf_counter(), 1e6 * time.thread_time())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--processor-time", action="store_true", help="of all Python, in one thread")
    options = parser.parse_args()
    figures = measure_processor_time if options.processor_time else measure
    for name, value in figures(options.steps).items():
        print(f"{name:<40} {value}")


def measure(steps: int) -> dict[str, Any]:
    """Medians per decode step that is planned ahead, at batch 1 and 32."""
    results: dict[str, Any] = {}
    for batch in BATCHES:
        plans = time_plans(batch, steps)
        pairs = list(itertools.pairwise(plans))
        results[f"step_us_batch_{batch}"] = round(statistics.median(b[0].passed - a[0].passed for a, b in pairs))
        for name in Times._fields:
            delays = [getattr(begin, name) - getattr(end, name) for (_, end), (begin, _) in pairs]
            unit = "us" if name == "passed" else "processor_us"
            results[f"outside_plan_{unit}_batch_{batch}"] = round(statistics.median(delays), 1)
    return results


def measure_processor_time(steps: int) -> dict[str, Any]:
    """Processor time per decode step, without the plan: 10th percentile and median."""
    results: dict[str, Any] = {}
    for batch in BATCHES:
        plans = time_plans(batch, steps, in_one_thread=True)
        outside = sorted(begin.processor - end.processor for (_, end), (begin, _) in itertools.pairwise(plans))
        results[f"processor_us_batch_{batch}_p10"] = round(outside[len(outside) // 10], 1)
        results[f"processor_us_batch_{batch}_p50"] = round(statistics.median(outside), 1)
    return results


def time_plans(batch: int, steps: int, *, in_one_thread: bool = False) -> list[tuple[Times, Times]]:
    """Begin and end of the plan of each decode step, by the thread that runs it."""
    config = PDSchedulerConfig(mode="time_share")
    llm = LLM(MODEL, dtype="float32", async_scheduling=not in_one_thread, scheduler=config)
    clock = PlanClock(llm.engine.executor.decoder.runner)
    params = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        llm.engine.add(str(i), None, [5 + i, 7, 11], params)
    for _ in range(NUM_FIRST + steps):
        llm.engine.step(only_finished=True)
    llm.close()
    return clock.plans[NUM_FIRST:]


class PlanClock:
    """Stand-in for a worker's decode plan that records its times."""

    def __init__(self, runner: ModelRunner) -> None:
        self.plans: list[tuple[Times, Times]] = []
        self._plan = runner.plan("decode")
        runner.plan = lambda stage, num_ubatches=1, of=runner.plan: (
            self if stage == "decode" else of(stage, num_ubatches)
        )

    def run(self, inputs: Inputs) -> list[Tensor]:
        begin = Times.now()
        outputs = self._plan.run(inputs)
        self.plans.append((begin, Times.now()))
        return outputs


if __name__ == "__main__":
    main()
