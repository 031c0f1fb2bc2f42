"""Measures how regular the time between two tokens is in a quiet decode: its median and 99th percentile.

    python benchmarks/decode_tail.py [--shape 135m] [--requests 4] [--steps 400]

Nothing arrives and nothing ends. The checkpoint has random weights of the shape, and is kept in --cache. Steps are
measured in bursts of half a second with pauses: under `chrt -f 50`, which keeps other programs of the machine away,
Linux stops threads that compute for 950 ms of a second.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.shapes import SHAPES, checkpoint

from sageLLM import LLM, SamplingParams

BURST_SECONDS = 0.5
NUM_WARM_UP_STEPS = 16
NUM_STEPS_AFTER_PAUSE = 2  # not measured: the caches are cold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    options = parser.parse_args()
    figures = measure(checkpoint(options.shape, options.cache), options.requests, options.steps)
    for name, value in figures.items():
        print(f"{name:<40} {value}")


def measure(model: Path, num_requests: int, steps: int) -> dict[str, Any]:
    """Milliseconds between tokens."""
    llm = LLM(model, skip_tokenizer=True, max_model_len=2048)
    params = SamplingParams(max_tokens=2 * steps + 64, temperature=0.0, ignore_eos=True)
    for i in range(num_requests):
        llm.engine.add(str(i), None, [5 + i, *range(7, 22)], params)
    for _ in range(NUM_WARM_UP_STEPS):
        llm.engine.step(only_finished=True)
    times: list[float] = []
    while len(times) < steps:
        times += _burst(llm)
        time.sleep(BURST_SECONDS)
    llm.close()
    ordered = sorted(times)
    p50, p99 = (1e3 * ordered[int(share * len(ordered))] for share in (0.5, 0.99))
    return {
        f"decode_ms_p50_requests_{num_requests}": round(p50, 2),
        f"decode_ms_p99_requests_{num_requests}": round(p99, 2),
        "p99_over_p50": round(p99 / p50, 2),
    }


def _burst(llm: LLM) -> list[float]:
    for _ in range(NUM_STEPS_AFTER_PAUSE):
        llm.engine.step(only_finished=True)
    ends = [time.perf_counter()]
    while ends[-1] - ends[0] < BURST_SECONDS:
        llm.engine.step(only_finished=True)
        ends.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(ends)]


if __name__ == "__main__":
    main()
