"""Compares two tensor-parallel ranks, and two pipeline stages, of one thread each with one process of two threads.

    python benchmarks/parallel.py [--shapes 135m,0.6b] [--rounds 5] [--cache FOLDER] [--out FILE.json]

Tokens per second of a decode of one request, of 16 requests, and of a prefill of 1024 tokens, in rounds that alternate
between the three; the ratios are medians over the rounds. All run in worker processes, which are loaded together.
Checkpoints are random, made once with transformers. Two ranks do not divide the 9 heads of 135m: there its layers have
8 query and 4 key heads of the same width. The machine should have two idle cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cost_error import folder_of
from machine import machine_facts
from peers.shapes import SHAPES

from sageLLM import LLM, SamplingParams

DEGREES = {"one process": (1, 1, 2), "tp=2": (2, 1, 1), "pp=2": (1, 2, 1)}  # ranks, stages, threads of each
NUM_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,0.6b", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    found = {shape: measure(folder_of(shape, 2, options.cache), options.rounds) for shape in options.shapes.split(",")}
    for shape, rows in found.items():
        for name, row in rows.items():
            rates = "".join(f"{row['rates'][degree]:>12.1f} {row['ratios'][degree]:>5.2f}" for degree in DEGREES)
            print(f"{shape:<6}{name:<20}{rates}")
    if options.out:
        text = json.dumps({"machine": machine_facts(), "shapes": found}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """For each kind of work the tokens per second of each degree, and their ratios to one process."""
    models = {name: load(folder, *degree) for name, degree in DEGREES.items()}
    try:
        rows = {}
        for name, run in RUNS.items():
            for llm in models.values():
                run(llm)  # plans its steps
            rates = [{degree: run(llm) for degree, llm in models.items()} for _ in range(rounds)]
            rows[name] = {
                "rates": {degree: statistics.median(one[degree] for one in rates) for degree in DEGREES},
                "ratios": {
                    degree: statistics.median(one[degree] / one["one process"] for one in rates) for degree in DEGREES
                },
            }
        return rows
    finally:
        for llm in models.values():
            llm.close()


def load(folder: Path, tp: int, pp: int, num_threads: int) -> LLM:
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # the worker processes inherit it
    return LLM(
        folder,
        skip_tokenizer=True,
        max_model_len=2048,
        enable_prefix_caching=False,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        distributed_executor_backend="mp",
    )


def decode(num_requests: int) -> Any:
    """A function that returns the tokens per second of a decode, without the prefill."""

    def run(llm: LLM) -> float:
        prompts = [[7 + i, 11, 13, 17] for i in range(num_requests)]
        params = SamplingParams(max_tokens=NUM_TOKENS + 1, temperature=0.0, ignore_eos=True)
        started = None
        for i, _ in enumerate(llm.stream(prompts, params)):
            if i + 1 == num_requests:  # about one token of each
                started = time.perf_counter()
        assert started is not None, "every request yields"
        return num_requests * NUM_TOKENS / (time.perf_counter() - started)

    return run


def prefill(llm: LLM) -> float:
    start = time.perf_counter()
    llm.generate([[5 + i % 1000 for i in range(1024)]], SamplingParams(max_tokens=1, temperature=0.0))
    return 1024 / (time.perf_counter() - start)


RUNS = {"decode, 1 request": decode(1), "decode, 16 requests": decode(16), "prefill of 1024": prefill}

if __name__ == "__main__":
    main()
