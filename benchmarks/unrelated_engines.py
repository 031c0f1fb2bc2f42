"""Measures two unrelated engines on two cores: the bound of `parallel.py` for two pipeline stages.

    python benchmarks/unrelated_engines.py [--shapes 135m,0.6b] [--rounds 3]

Two engines of one thread decode 8 requests each at the same time. They read as many weights as two stages with 16
requests do, and wait for nothing. Their rate is compared with that of one engine with two threads and 16 requests.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "peers"))
NUM_TOKENS = 96
START_SECONDS = 8.0
"""From the start of the processes until all of them decode, in which they load the checkpoint."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,0.6b", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "REQUESTS", "START"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(decode_rate(options.child[0], int(options.child[1]), float(options.child[2])))
        return
    from shapes import checkpoint

    for shape in options.shapes.split(","):
        folder = checkpoint(shape, options.cache)
        for _ in range(options.rounds):
            two, one = together(folder, [(0,), (1,)], 8), together(folder, [(0, 1)], 16)
            print(f"{shape:<6}{two:9.1f} and {one:9.1f} tokens/s, {two / one:.2f}", flush=True)


def together(folder: Path, cores: list[tuple[int, ...]], num_requests: int) -> float:
    """Tokens per second of all engines, each on its cores with a thread for each."""
    start = time.time() + START_SECONDS
    command = [sys.executable, __file__, "--child", str(folder), str(num_requests), str(start)]
    engines = []
    for some in cores:
        pinned = ["taskset", "--cpu-list", ",".join(map(str, some)), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(some))}
        engines.append(subprocess.Popen(pinned, stdout=subprocess.PIPE, text=True, env=environment))
    return sum(float(engine.communicate()[0].split()[-1]) for engine in engines)


def decode_rate(folder: str, num_requests: int, start: float) -> float:
    """Tokens per second of short prompts, from the given time on."""
    from sageLLM import LLM, SamplingParams

    llm = LLM(folder, max_model_len=512, skip_tokenizer=True)
    prompts = [[5 + i, 9, 11, 13] for i in range(num_requests)]
    llm.generate(prompts, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    if time.time() > start:
        raise SystemExit(f"the engine took longer than {START_SECONDS:g} s to load")
    time.sleep(start - time.time())
    begin = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True))
    return num_requests * NUM_TOKENS / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
