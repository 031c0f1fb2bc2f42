"""Control of `disaggregation.py tail`: another process works on the first core, as the prefill worker does.

    python benchmarks/disaggregation_control.py MODEL PROMPT_LEN INTERVAL prompts|products|reads

Decodes share the machine with it and nothing else, so what they lose is not caused by the transfer, the scheduler or
the process of the engine. An engine computes prompts; or, to tell what the cores share, the process multiplies matrices
that stay in its caches, or reads memory, for as long as a prompt takes. It prints a line when it is ready, works every
INTERVAL seconds from the line that it reads until its input ends, and prints the milliseconds that each time took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

CHUNK = 512
WORK_SECONDS = 1.6
"""The time of products and of reads: that of a prompt of 2,000 tokens of the 135M shape on one core."""
MATRIX_SIZE, READ_BYTES = 192, 2**28


class WorkApart:
    """The process; `begin` lets it work, and `end` returns the milliseconds of each time."""

    def __init__(self, model: Path, prompt_len: int, interval: float, kind: str) -> None:
        command = [sys.executable, __file__, str(model), str(prompt_len), str(interval), kind]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> list[float]:
        found, _ = self._process.communicate()  # closes its input
        return [float(line) for line in found.split()]


def end_with_input() -> None:
    """Ends the process when the benchmark closes its input, or has ended."""
    sys.stdin.read()
    os._exit(0)


def prompts(model: str, prompt_len: int) -> Callable[[], object]:
    """Computes another prompt in each call."""
    from sageLLM import LLM, PDSchedulerConfig, SamplingParams

    config = PDSchedulerConfig(mode="time_share", prefill_chunk_size=CHUNK, max_prefill_tokens=2048)
    llm = LLM(model, skip_tokenizer=True, max_model_len=2048, scheduler=config, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    rows = ([7 + (number * 31 + i) % 900 for i in range(prompt_len)] for number in range(10**6))
    return lambda: llm.generate([next(rows)], params)


def repeated(work: Callable[[], object]) -> Callable[[], object]:
    """Does the work again and again for the time of a prompt."""

    def run() -> None:
        end = time.perf_counter() + WORK_SECONDS
        while time.perf_counter() < end:
            work()

    return run


def work_of(kind: str, model: str, prompt_len: int) -> Callable[[], object]:
    """What the process does each time."""
    if kind == "prompts":
        return prompts(model, prompt_len)
    if kind == "products":
        a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE)
        return repeated(lambda: torch.mm(a, b))
    numbers = torch.ones(READ_BYTES // 4)
    return repeated(numbers.sum)


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    model, prompt_len, interval, kind = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    work = work_of(kind, model, prompt_len)
    work()
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=end_with_input, daemon=True).start()
    begun, number = time.perf_counter(), 0
    while True:
        time.sleep(max(0.0, begun + number * interval - time.perf_counter()))
        start = time.perf_counter()
        work()
        print(round(1e3 * (time.perf_counter() - start)), flush=True)
        number += 1


if __name__ == "__main__":
    main()
