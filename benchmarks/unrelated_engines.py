"""Compares two pipeline stages with two unrelated engines on two cores, which are their bound.

    python benchmarks/unrelated_engines.py [--shapes 135m,0.6b] [--rounds 3]

Two engines of one thread decode 8 requests each at the same time. They read as many weights as two stages with 16
requests do, and wait for nothing. In each round both are compared with one engine of two threads and 16 requests, as
the rate at which two cores read memory can differ from minute to minute.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "peers"))
NUM_TOKENS = 96
START_SECONDS = 8.0
"""From the start of the processes until all of them decode, in which they load the checkpoint."""


class Kind(NamedTuple):
    """Engines that run at the same time: the cores of each, its threads per stage, stages and requests."""

    cores: tuple[str, ...]
    num_threads: int
    num_stages: int
    num_requests: int


KINDS = {
    "one engine": Kind(("0,1",), 2, 1, 16),
    "two stages": Kind(("0,1",), 1, 2, 16),
    "two engines": Kind(("0", "1"), 1, 1, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,0.6b", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start-seconds", type=float, default=START_SECONDS, help="from the start to the first token")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    parser.add_argument("--child", nargs=4, metavar=("FOLDER", "REQUESTS", "STAGES", "START"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, num_requests, num_stages, start = options.child
        print(decode_rate(folder, int(num_requests), int(num_stages), float(start)))
        return
    from shapes import checkpoint

    for shape in options.shapes.split(","):
        folder = checkpoint(shape, options.cache)
        rounds = []
        for _ in range(options.rounds):
            rates = {name: together(folder, kind, options.start_seconds) for name, kind in KINDS.items()}
            rounds.append(ratios(rates))
            print(f"{shape:<6}{shown(rates, '9.1f')} tokens/s; {shown(rounds[-1], '.2f')}", flush=True)
        medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        print(f"{shape:<6}medians: {shown(medians, '.2f')}", flush=True)


def ratios(rates: dict[str, float]) -> dict[str, float]:
    """Rates as multiples of that of one engine, and those of the stages as a multiple of their bound."""
    one, stages, engines = (rates[name] for name in KINDS)
    return {"stages / one": stages / one, "engines / one": engines / one, "stages / engines": stages / engines}


def shown(values: dict[str, float], form: str) -> str:
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


def together(folder: Path, kind: Kind, start_seconds: float) -> float:
    """Tokens per second of all engines."""
    start = time.time() + start_seconds
    arguments = [str(folder), str(kind.num_requests), str(kind.num_stages), str(start)]
    command = [sys.executable, __file__, "--child", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(kind.num_threads)}
    engines = [
        subprocess.Popen(["taskset", "--cpu-list", cores, *command], stdout=subprocess.PIPE, text=True, env=environment)
        for cores in kind.cores
    ]
    return sum(float(engine.communicate()[0].split()[-1]) for engine in engines)


def decode_rate(folder: str, num_requests: int, num_stages: int, start: float) -> float:
    """Tokens per second of short prompts, from the given time on."""
    from sageLLM import LLM, SamplingParams

    llm = LLM(folder, max_model_len=512, skip_tokenizer=True, pipeline_parallel_size=num_stages)
    prompts = [[5 + i, 9, 11, 13] for i in range(num_requests)]
    llm.generate(prompts, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    if time.time() > start:
        raise SystemExit("the engine took too long to load; raise --start-seconds")
    time.sleep(start - time.time())
    begin = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True))
    rate = num_requests * NUM_TOKENS / (time.perf_counter() - begin)
    llm.close()
    return rate


if __name__ == "__main__":
    main()
