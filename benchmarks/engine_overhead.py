"""Measures what the engine adds to the kernels: time per decode step outside the plan's kernel calls.

    python benchmarks/engine_overhead.py [--steps N]

A step is timed as a whole, and inside it the kernels; the difference is scheduling, input tensors, sampling, text and
the plan's own loop. The model is llama-shaped with random weights, small enough that the overhead is not lost in noise.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sageLLM import LLM, PDSchedulerConfig, SamplingParams

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
        results[f"outside_kernels_us_batch_{batch}"] = round(total - inside)
    return results


def _time_steps(batch: int, steps: int) -> tuple[float, float]:
    llm = LLM(MODEL, dtype="float32", scheduler=PDSchedulerConfig(mode="time_share"))
    clock = KernelClock()
    clock.watch(llm)
    params = SamplingParams(max_tokens=steps + 8, temperature=0.0, ignore_eos=True)
    for i in range(batch):
        llm.engine.add(str(i), None, [5 + i, 7, 11], params)
    for _ in range(5):
        llm.engine.step()
    totals, insides = [], []
    for _ in range(steps):
        clock.seconds = 0.0
        start = time.perf_counter()
        llm.engine.step()
        totals.append(1e6 * (time.perf_counter() - start))
        insides.append(1e6 * clock.seconds)
    return statistics.median(totals), statistics.median(insides)


class KernelClock:
    """Sums the time spent in kernels by wrapping those of the decode plan."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, llm: LLM) -> None:
        llm.engine.decoder.plan("decode").wrap_kernels(self._timed)

    def _timed(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*operands: Any, **attrs: Any) -> Any:
            start = time.perf_counter()
            result = kernel(*operands, **attrs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


if __name__ == "__main__":
    main()
