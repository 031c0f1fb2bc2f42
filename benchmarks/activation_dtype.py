"""Rates of models with weights of codes and activations of 8 bits, against activations that are not rounded, and bf16.

    python benchmarks/activation_dtype.py [--shapes 135m,0.6b] [--forms int8,int4-g128] [--rounds 5] [--threads N]

Every figure is of a new process: the best of some prompts of 1024 tokens, of answers of 16 requests at once, and the
median step of one request. Processes of bf16, of a form, and of it with activations of 8 bits take turns; the table
shows the medians of the rounds, and the medians of the ratios within a round to bf16 and to the form, which other work
on the machine disturbs less than the rates. With one thread the time is that of the processor.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from packed_decode import quantised

FIGURES = ("prefill", "batch", "decode")
PROMPT, REQUESTS, NEW = 1024, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,0.6b")
    parser.add_argument("--forms", default="int8,int4-g128")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "sagellm-start-up"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(rates(Path(args.child[0]), args.child[1], args.threads)))
        return
    for shape in args.shapes.split(","):
        for form in args.forms.split(","):
            compare(shape, form, args)


def compare(shape: str, form: str, args: argparse.Namespace) -> None:
    """Prints the rows of a shape and a form."""
    plain, coded = quantised(shape, "bf16", args.cache), quantised(shape, form, args.cache)
    variants = {"bf16": (plain, "auto"), form: (coded, "auto"), f"{form} a8": (coded, "int8")}
    rounds = [{name: run(*variant, args.threads) for name, variant in variants.items()} for _ in range(args.rounds)]
    print(f"{shape:12}" + "".join(f"{name:>32}" for name in variants))
    for figure in FIGURES:
        row = f"{figure:12}"
        for name in variants:
            rate = statistics.median(one[name][figure] for one in rounds)
            to_plain = statistics.median(one[name][figure] / one["bf16"][figure] for one in rounds)
            to_coded = statistics.median(one[name][figure] / one[form][figure] for one in rounds)
            row += f"{rate:12.1f}{to_plain:10.2f}{to_coded:10.2f}"
        print(row, flush=True)


def run(folder: Path, activations: str, threads: int) -> dict[str, float]:
    """The rates of a new process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--child", str(folder), activations]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rates(folder: Path, activations: str, threads: int) -> dict[str, float]:
    """Tokens per second of this process, by figure."""
    import torch

    from sageLLM import LLM, SamplingParams

    clock = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads or torch.get_num_threads())
    llm: Any = LLM(folder, skip_tokenizer=True, enable_prefix_caching=False, activation_dtype=activations)

    def seconds(prompts: list[list[int]], num_new: int) -> float:
        start = clock()
        llm.generate(prompts, SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True))
        return clock() - start

    def prompt(length: int, seed: int) -> list[int]:
        return [(seed * 131 + i * 7919) % 4000 for i in range(length)]

    seconds([prompt(PROMPT, 0)], 1)
    prefill = min(seconds([prompt(PROMPT, seed)], 1) for seed in range(1, 6))
    batch = [prompt(16, seed) for seed in range(REQUESTS)]
    seconds(batch, 2)
    steps = min(seconds(batch, NEW + 1) for _ in range(3)) - min(seconds(batch, 1) for _ in range(3))
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    times = [clock() for _ in llm.stream([prompt(8, 1)], params)]
    decode = statistics.median(after - before for before, after in pairwise(times[4:]))
    return {"prefill": PROMPT / prefill, "batch": REQUESTS * NEW / steps, "decode": 1 / decode}


if __name__ == "__main__":
    main()
