"""Control of `disaggregation.py tail`: another engine computes the prompts, in a separate process.

    python benchmarks/disaggregation_control.py MODEL PROMPT_LEN INTERVAL

Decodes and prompts share the memory and the caches of the machine and nothing else, so what the decodes lose is not
caused by the transfer, the scheduler or the process of the engine. The process uses the first core, as the prefill
worker does. It prints a line when it is ready, computes a prompt every INTERVAL seconds from the line that
it reads until its input ends, and prints the milliseconds that each took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

CHUNK = 512


class PromptsApart:
    """The process; `begin` lets it compute prompts, and `end` returns the milliseconds of each."""

    def __init__(self, model: Path, prompt_len: int, interval: float) -> None:
        command = [sys.executable, __file__, str(model), str(prompt_len), str(interval)]
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


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from sageLLM import LLM, PDSchedulerConfig, SamplingParams

    model, prompt_len, interval = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    config = PDSchedulerConfig(mode="time_share", prefill_chunk_size=CHUNK, max_prefill_tokens=2048)
    llm = LLM(model, skip_tokenizer=True, max_model_len=2048, scheduler=config, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    prompts = ([7 + (number * 31 + i) % 900 for i in range(prompt_len)] for number in range(10**6))
    llm.generate([next(prompts)], params)
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=end_with_input, daemon=True).start()
    begun = time.perf_counter()
    for number, prompt in enumerate(prompts):
        time.sleep(max(0.0, begun + number * interval - time.perf_counter()))
        start = time.perf_counter()
        llm.generate([prompt], params)
        print(round(1e3 * (time.perf_counter() - start)), flush=True)


if __name__ == "__main__":
    main()
