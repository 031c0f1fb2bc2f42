"""Cost of HTTP: throughput and time to first token of `sagellm serve` against `LLM` in process, in one run.

    python benchmarks/serving.py [--model FOLDER ...] [--shape 135m] [--streams 32] [--rounds 5]

One column per checkpoint: the cost per token is that of a model of any size, so its share depends on the model's step.
Rounds alternate between the two, each side with a warm engine; figures are medians. The same prompts of token ids, the
same lengths and greedy sampling; `LLM` streams too, so both produce every token at its step. The client of the server
runs on the same cores, so it looks for the end of a stream only, and its processor time is printed. A shape is a
checkpoint of random weights (`benchmarks/peers/shapes.py`); without a tokenizer answers have no text.
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
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from peers.shapes import SHAPES, checkpoint

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.serve import loop_factory
from sageLLM.runtime.server.http_client import Address

ROOT = Path(__file__).resolve().parents[1]
TAIL_BYTES = 1024
"""The end of a stream that is kept, with the event of the usage."""


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


class Stream(asyncio.Protocol):
    """One streamed request over a connection: the time of its first event, and its end."""

    def __init__(self, request: bytes) -> None:
        self._request, self._tail = request, b""
        self.start = self.first = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport, self.start = transport, time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.first and b"data: " in data:
            self.first = time.perf_counter()
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        if self._tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            self._transport.close()
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(RuntimeError(f"the stream was cut: {self._tail!r}"))

    @property
    def num_tokens(self) -> int:
        """By the usage, which is the last event."""
        return int(re.findall(rb'"completion_tokens":(\d+)', self._tail)[-1])


def request_for(prompt: list[int], num_tokens: int) -> bytes:
    fields = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body = msgspec.json.encode({"prompt": prompt, "stream_options": {"include_usage": True}, **fields})
    return b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def load(address: Address, prompts: list[list[int]], num_tokens: int) -> tuple[float, list[float]]:
    """Tokens per second and the times to the first token."""

    async def run() -> tuple[float, list[float]]:
        loop, requests = asyncio.get_running_loop(), [request_for(prompt, num_tokens) for prompt in prompts]
        start = time.perf_counter()
        made = (loop.create_connection(partial(Stream, one), address.host, address.port) for one in requests)
        streams = [stream for _, stream in await asyncio.gather(*made)]
        await asyncio.gather(*(one.ended for one in streams))
        seconds = time.perf_counter() - start
        assert all(one.num_tokens == num_tokens for one in streams)
        return num_tokens * len(prompts) / seconds, [one.first - one.start for one in streams]

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(run())


def measure(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """The figures of one checkpoint."""
    draw = random.Random(0)
    vocab, num_tokens = json.loads((model / "config.json").read_text())["vocab_size"], options.output_len

    def prompts(count: int) -> list[list[int]]:
        return [[draw.randrange(vocab) for _ in range(options.input_len)] for _ in range(count)]

    llm = LLM(model, skip_tokenizer=not (model / "tokenizer.json").exists())
    ours, http, ours_ttft, http_ttft, front_us, client_us = [], [], [], [], [], []
    with server(model) as (address, pid):
        throughput_of_llm(llm, prompts(options.streams), num_tokens)
        load(address, prompts(options.streams), num_tokens)
        for _ in range(options.rounds):
            some = prompts(options.streams)
            ours.append(throughput_of_llm(llm, some, num_tokens))
            before, own = cpu_seconds(pid), time.process_time()
            http.append(load(address, some, num_tokens)[0])
            front_us.append(1e6 * (cpu_seconds(pid) - before) / (options.streams * num_tokens))
            client_us.append(1e6 * (time.process_time() - own) / (options.streams * num_tokens))
            for prompt in prompts(options.idle_requests // options.rounds):
                ours_ttft.append(ttft_of_llm(llm, prompt))
                http_ttft += load(address, [prompt], 2)[1]
    llm.close()
    return {
        "streams": options.streams,
        "llm_tokens_per_s": statistics.median(ours),
        "http_tokens_per_s": statistics.median(http),
        "throughput_ratio": statistics.median(b / a for a, b in zip(ours, http, strict=True)),
        "front_cpu_us_per_token": statistics.median(front_us),
        "client_cpu_us_per_token": statistics.median(client_us),
        "llm_ttft_ms": 1e3 * statistics.median(ours_ttft),
        "http_ttft_ms": 1e3 * statistics.median(http_ttft),
        "http_ttft_p90_ms": 1e3 * float(np.percentile(http_ttft, 90)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", help="folders of checkpoints; the bundled one by default")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle-requests", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sagellm-bench")
    options = parser.parse_args()
    models = options.model or ([] if options.shape else [ROOT / "examples" / "tiny_python_model"])
    if options.shape is not None:
        models.append(checkpoint(options.shape, options.cache))
    found = {model.name: measure(model, options) for model in models}
    print(" " * 24 + "".join(f"{name:>20}" for name in found))
    for name in next(iter(found.values())):
        print(f"{name:<24}" + "".join(f"{figures[name]:>20.2f}" for figures in found.values()))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
