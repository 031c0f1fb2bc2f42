"""Cost of HTTP: throughput and time to first token of `sagellm serve` against `LLM` in process, in one run.

    python benchmarks/serving.py [--model FOLDER | --shape 135m] [--streams 32] [--rounds 5]

Rounds alternate between the two, each side with a warm engine; figures are medians. The same prompts of token ids, the
same lengths and greedy sampling. The client of the server runs on the same cores, and its processor time is printed
too. `LLM` streams too, so both produce every token at its step. A shape is a checkpoint of
random weights without a tokenizer (`benchmarks/peers/shapes.py`), so its answers have no text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from peers.shapes import SHAPES, checkpoint

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.serve import loop_factory
from sageLLM.runtime.server.http_client import Address
from sageLLM.runtime.server.load import LoadPlan, run_load

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[Address, int]]:
    """The address and the process id of the front."""
    command = [sys.executable, "-m", "sageLLM.runtime.cli.entry", "serve", str(model), "--port", "0", "--no-access-log"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"serving \S+ at (\S+)/v1", line):
                yield Address.of(found[1]), process.pid
                return
        raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(30)


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far; NaN without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput_of_llm(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    start = time.perf_counter()
    for _ in llm.stream(prompts, SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)):
        pass
    return len(prompts) * num_tokens / (time.perf_counter() - start)


def ttft_of_llm(llm: LLM, prompt: list[int]) -> float:
    start = time.perf_counter()
    stream = llm.stream([prompt], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    next(stream)
    seconds = time.perf_counter() - start
    for _ in stream:
        pass
    return seconds


def load(address: Address, prompts: list[list[int]], num_tokens: int, name: str) -> tuple[float, list[float]]:
    """Tokens per second and the times to the first token."""
    plan = LoadPlan(prompts=prompts, output_len=num_tokens, model=name)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        outcomes, seconds = runner.run(run_load(plan, address))
    assert all(not one.error for one in outcomes), outcomes[0].error
    return sum(one.output_len for one in outcomes) / seconds, [one.ttft for one in outcomes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_python_model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle-requests", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sagellm-bench")
    options = parser.parse_args()
    if options.shape is not None:
        options.model = checkpoint(options.shape, options.cache)
    draw = random.Random(0)
    vocab = json.loads((options.model / "config.json").read_text())["vocab_size"]

    def prompts(count: int) -> list[list[int]]:
        return [[draw.randrange(vocab) for _ in range(options.input_len)] for _ in range(count)]

    llm = LLM(options.model, skip_tokenizer=options.shape is not None)
    ours, http, ours_ttft, http_ttft, front_us, client_us = [], [], [], [], [], []
    with server(options.model) as (address, pid):
        throughput_of_llm(llm, prompts(options.streams), options.output_len)
        load(address, prompts(options.streams), options.output_len, str(options.model))
        for _ in range(options.rounds):
            some = prompts(options.streams)
            ours.append(throughput_of_llm(llm, some, options.output_len))
            before, own = cpu_seconds(pid), time.process_time()
            http.append(load(address, some, options.output_len, str(options.model))[0])
            num_tokens = options.streams * options.output_len
            front_us.append(1e6 * (cpu_seconds(pid) - before) / num_tokens)
            client_us.append(1e6 * (time.process_time() - own) / num_tokens)
            for prompt in prompts(options.idle_requests // options.rounds):
                ours_ttft.append(ttft_of_llm(llm, prompt))
                http_ttft += load(address, [prompt], 2, str(options.model))[1]
    ratio = statistics.median(b / a for a, b in zip(ours, http, strict=True))
    found = {
        "streams": options.streams,
        "llm_tokens_per_s": statistics.median(ours),
        "http_tokens_per_s": statistics.median(http),
        "throughput_ratio": ratio,
        "front_cpu_us_per_token": statistics.median(front_us),
        "client_cpu_us_per_token": statistics.median(client_us),
        "llm_ttft_ms": 1e3 * statistics.median(ours_ttft),
        "http_ttft_ms": 1e3 * statistics.median(http_ttft),
        "http_ttft_p90_ms": 1e3 * float(np.percentile(http_ttft, 90)),
    }
    for name, value in found.items():
        print(f"{name:<22} {value:.2f}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
