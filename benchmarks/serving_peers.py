"""Time to first token and output rate of `sagellm serve` and other servers at 1 to 128 streams, in one run.

    python benchmarks/serving_peers.py --peer vllm="PYTHON -m vllm.entrypoints.openai.api_server --model {model}
        --served-model-name tiny --port {port} --dtype float32 --max-model-len 512"

A peer is a command that serves the model at {port} with OpenAI's API; {model} is the folder. The servers run one after
another, in every round, so that each has the machine for itself. Prompts are token ids, the same for all, or with
`--as-text` random words, for servers without token ids. Figures are medians of the rounds.

For the server of llama-cpp-python (its extra `server`), which answers one request after another:

    sagellm convert examples/tiny_python_model tiny.gguf --format float32
    PYTHON benchmarks/peers/gguf_vocabulary.py examples/tiny_python_model tiny.gguf tiny-with-vocabulary.gguf
    python benchmarks/serving_peers.py --as-text --min-tokens --peer llama="PYTHON -m llama_cpp.server
        --model tiny-with-vocabulary.gguf --model_alias tiny --port {port} --n_ctx 512 --n_threads 2
        --interrupt_requests false"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sageLLM.runtime.cli.bench_serve import WORDS
from sageLLM.runtime.cli.serve import loop_factory
from sageLLM.runtime.server.http_client import Address, Connection, HttpError
from sageLLM.runtime.server.load import LoadPlan, run_load

ROOT = Path(__file__).resolve().parents[1]
OURS = "-m sageLLM.runtime.cli.entry serve {model} --served-model-name tiny --port {port} --no-access-log"
START_SECONDS = 600


class Figures(NamedTuple):
    """Milliseconds to the first token (p50), and tokens per second."""

    ttft_ms: float
    tokens_per_s: float


@contextmanager
def running(command: str, model: Path) -> Iterator[tuple[Address, str]]:
    """The address of a server and the name of its model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = shlex.split(command.format(model=model, port=port))
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = Address("127.0.0.1", port, "")
        yield address, asyncio.run(_name(address, process))
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def _name(address: Address, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return str((await Connection(address).json("GET", "/v1/models"))["data"][0]["id"])
        except (OSError, HttpError):
            await asyncio.sleep(0.5)
    raise RuntimeError(f"the server did not start: {shlex.join(process.args)}")  # type: ignore[arg-type]


def measure(
    address: Address, name: str, prompts: list[list[int] | str], num_tokens: int, *, has_min_tokens: bool
) -> Figures:
    """One load: all prompts at once."""
    extra = {"min_tokens": num_tokens} if has_min_tokens else {}
    plan = LoadPlan(prompts=prompts, output_len=num_tokens, model=name, extra=extra)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        outcomes, seconds = runner.run(run_load(plan, address))
    failed = [one.error for one in outcomes if one.error]
    assert not failed, failed[0]
    assert all(one.output_len == num_tokens for one in outcomes), [one.output_len for one in outcomes]
    ttft = statistics.median(one.ttft for one in outcomes)
    return Figures(1e3 * ttft, sum(one.output_len for one in outcomes) / seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny_python_model")
    parser.add_argument("--options", default="--dtype float32", help="of `sagellm serve`")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--streams", default="1,8,32,128")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as-text", action="store_true")
    parser.add_argument("--min-tokens", action="store_true", help="for servers without ignore_eos")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    commands = {"sagellm": f"{shlex.quote(sys.executable)} {OURS} {options.options}"}
    commands |= dict(text.split("=", 1) for text in options.peer)
    streams = [int(one) for one in options.streams.split(",")]
    vocab = json.loads((options.model / "config.json").read_text())["vocab_size"]
    draw, found = random.Random(0), defaultdict[tuple[str, int], list[Figures]](list)

    def prompts(count: int) -> list[list[int] | str]:
        if options.as_text:
            return [" ".join(draw.choices(WORDS, k=options.input_len)) for _ in range(count)]
        return [[draw.randrange(3, vocab) for _ in range(options.input_len)] for _ in range(count)]

    for _ in range(options.rounds):
        some = {count: prompts(count) for count in streams}
        for name, command in commands.items():
            with running(command, options.model.resolve()) as (address, model):
                measure(address, model, prompts(8), 16, has_min_tokens=options.min_tokens)
                for count in streams:
                    found[name, count].append(
                        measure(address, model, some[count], options.output_len, has_min_tokens=options.min_tokens)
                    )
    print(f"{'server':<10} {'streams':>7} {'TTFT p50':>12} {'output':>14}")
    rows = []
    for (name, count), figures in found.items():
        ttft, rate = (statistics.median(values) for values in zip(*figures, strict=True))
        rows.append({"server": name, "streams": count, "ttft_ms": ttft, "tokens_per_s": rate})
        print(f"{name:<10} {count:>7} {ttft:>9.1f} ms {rate:>7.0f} tokens/s")
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
