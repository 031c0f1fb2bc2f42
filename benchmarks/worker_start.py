"""Seconds to start two worker processes: the first time in a process, again, and after the loss of a worker.

    python benchmarks/worker_start.py [--rounds 3]

The bundled model is small, so that what is measured is the start of processes. The first start imports torch in the
fork server; "import" is the time for that alone, in a new process. Each round has its own engine process.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODEL = Path(__file__).parents[1] / "examples" / "tiny_python_model"
NAMES = ("first start", "start again", "answer after a loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="measure once, in this process")
    options = parser.parse_args()
    if options.one:
        print(*measure())
        return
    command = [sys.executable, __file__, "--one"]
    rounds = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(options.rounds)]
    rows = [list(map(float, done.stdout.split())) for done in rounds]
    imports = [timed_import() for _ in range(options.rounds)]
    for name, seconds in zip(("import", *NAMES), [imports, *map(list, zip(*rows, strict=True))], strict=True):
        print(f"{name:<20} {statistics.median(seconds):6.2f} s")


def timed_import() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import sageLLM.runtime.worker.process"], check=True)
    return time.perf_counter() - start


def measure() -> list[float]:
    """The seconds of `NAMES`."""
    from sageLLM import LLM, SamplingParams
    from sageLLM.runtime.worker.process_executor import ProcessExecutor

    found = []
    for _ in range(2):
        start = time.perf_counter()
        llm = LLM(MODEL, dtype="float32", tensor_parallel_size=2)
        found.append(time.perf_counter() - start)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    llm.generate(["def "], params)
    executor = llm.engine.executor
    assert isinstance(executor, ProcessExecutor)
    os.kill(executor.process_ids[0], signal.SIGKILL)
    start = time.perf_counter()
    llm.generate(["def "], params)
    return [*found, time.perf_counter() - start]


if __name__ == "__main__":
    main()
