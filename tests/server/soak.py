"""Load on `sagellm serve` with cancels, and a search for leaks.

    python tests/server/soak.py --requests 1000000 --seconds 3600 --total soak.json

ends with the numbers of requests, KV blocks, file descriptors, threads and memory of both processes before and after;
with `--total`, several runs add up in a file. The model is a random one of a single layer, so that most of the time is
the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors.numpy import save_file
from servers import MODEL
from test_process import ServeProcess

from sageLLM.runtime.cli.serve import loop_factory
from sageLLM.runtime.server.http_client import Address, Connection, HttpError

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def write_small_model(folder: Path) -> Path:
    """The bundled tokenizer with random weights of one layer of 64 channels."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "dtype": "float32"}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = json.loads((folder / "config.json").read_text()) | sizes | heads
    (folder / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], 64),
        "model.norm.weight": (64,),
        f"{layer}input_layernorm.weight": (64,),
        f"{layer}post_attention_layernorm.weight": (64,),
        **{f"{layer}self_attn.{name}_proj.weight": (rows, 64) for name, rows in (("q", 64), ("k", 32), ("v", 32))},
        **{f"{layer}{name}_proj.weight": (64, 64) for name in ("self_attn.o", "mlp.gate", "mlp.up", "mlp.down")},
    }
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(size=shape, scale=0.1).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


async def one_request(address: Address, draw: random.Random, cancel: float) -> str:
    """Sends a random request, and closes the connection at a random time for the share `cancel` of them."""
    num_answers = draw.choice([1, 1, 1, 2])
    body: dict[str, Any] = {
        "prompt": [draw.randrange(2000) for _ in range(draw.randint(1, 60))],
        "max_tokens": draw.choice([1, 2, 4, 8, 40]),
        "n": num_answers,
        "temperature": draw.choice([0, 0, 0, 1]) if num_answers == 1 else 1,
        "stop": draw.choice([None, None, "self"]),
        "stream": True,
        "ignore_eos": True,
        "priority": draw.choice([0, 0, 1]),
    }
    limit = draw.choice([0.001, 0.01, 0.05]) if draw.random() < cancel else None

    async def read() -> str:
        try:
            async for _ in Connection(address).events("/v1/completions", body):
                pass
        except HttpError as error:
            return str(error).partition(":")[0]
        return "complete"

    try:
        return await asyncio.wait_for(read(), limit)
    except TimeoutError:
        return "cancelled"


class ShortRequests(asyncio.Protocol):
    """Requests for one to three tokens over a kept connection, at little cost for the client; a cancel closes it."""

    def __init__(self, address: Address, draw: random.Random) -> None:
        self._address, self._draw = address, draw
        self._transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def ask(self, cancel: float) -> str:
        """Sends one, and closes the connection after a random time for the share `cancel` of them."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            self._transport, _ = await loop.create_connection(lambda: self, self._address.host, self._address.port)
        self._answer = loop.create_future()
        self._data.clear()
        self._transport.write(self._request())
        if self._draw.random() < cancel:
            await asyncio.sleep(self._draw.choice([0, 0, 0.001, 0.005]))
            if not self._answer.done():
                self._transport.abort()
                return "cancelled"
        answer = await self._answer
        status, _, rest = answer.partition(b"\r\n")
        is_whole = status == b"HTTP/1.1 200 OK" and b'"length"' in rest and b'{"error"' not in rest
        return "complete" if is_whole else str(status)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        is_whole = len(body) == int(length[1]) if length else body.endswith(b"\r\n0\r\n\r\n")
        if found and is_whole and not self._answer.done():
            self._answer.set_result(bytes(self._data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answer.done():
            self._answer.set_result(b"the connection was cut")

    def _request(self) -> bytes:
        draw = self._draw
        fields = {"max_tokens": draw.randint(1, 3), "temperature": 0, "ignore_eos": True, "stream": draw.random() < 0.5}
        body = msgspec.json.encode({"prompt": [draw.randrange(500) for _ in range(draw.randint(1, 8))], **fields})
        return b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def resources(server: ServeProcess) -> dict[str, float]:
    """Counts that must be the same whenever nothing runs, and resident memory in MiB."""
    page = server.http.get("/metrics").text

    def metric(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)}\S* (\S+)$", page, re.MULTILINE))

    found = {
        "running": metric("sagellm:num_requests_running"),
        "waiting": metric("sagellm:num_requests_waiting{"),
        "queued": metric("sagellm:num_requests_queued"),
        "blocks used": metric('sagellm:kv_blocks{engine="0",model_name="' + server.model + '",state="used"}'),
    }
    for name, pid in (("front", server.process.pid), ("engine", server.engine_id)):
        status = Path(f"/proc/{pid}/status").read_text()
        found[f"{name} threads"] = float(re.findall(r"Threads:\s+(\d+)", status)[0])
        found[f"{name} files"] = float(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        found[f"{name} MiB"] = int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024
    return found


async def soak(
    address: Address,
    num_requests: int,
    cancel: float,
    concurrency: int,
    seed: int,
    seconds: float | None = None,
    on_end: Callable[[int], None] = lambda num_ended: None,
    short: float = 0,
) -> Counter[str]:
    """Requests of so many clients, each one after another; no new ones after `seconds`. The share `short` is short."""
    draw, ends = random.Random(seed), Counter[str]()
    remaining, start = iter(range(num_requests)), time.monotonic()

    async def worker() -> None:
        client = ShortRequests(address, draw)
        for _ in remaining:
            if seconds is not None and time.monotonic() > start + seconds:
                break
            is_short = draw.random() < short
            ends[await (client.ask(cancel) if is_short else one_request(address, draw, cancel))] += 1
            on_end(ends.total())
        client.close()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    await asyncio.sleep(0)  # the transports close their sockets in the next round of the loop
    return ends


def wait_until_idle(server: ServeProcess, idle: dict[str, float]) -> dict[str, float]:
    """Waits for aborts and closing connections; returns the resources then."""
    deadline = time.monotonic() + 30
    while True:
        found = resources(server)
        if all(found[name] == idle[name] for name in ("running", "waiting", "queued", "blocks used")):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def run_soak(
    num_requests: int, cancel: float, concurrency: int, seed: int, seconds: float | None, total: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = write_small_model(Path(folder, "model"))
        # A small KV cache, as its memory is used block by block, and so that requests are preempted.
        server = ServeProcess("--no-access-log", "--num-kv-blocks", "96", model=model)
        try:
            address = Address.of(server.url)
            run(soak(address, min(5000, max(200, num_requests // 20)), cancel, concurrency, seed))  # fills caches
            time.sleep(1)
            before, start = resources(server), time.monotonic()

            def report(num_ended: int) -> None:
                if num_ended % 20_000 == 0:
                    memory = {name: round(value) for name, value in resources(server).items() if "MiB" in name}
                    print(f"{num_ended} requests in {time.monotonic() - start:.0f} s: {memory}", flush=True)

            ends = run(soak(address, num_requests, cancel, concurrency, seed + 1, seconds, report))
            after = wait_until_idle(server, {"running": 0, "waiting": 0, "queued": 0, "blocks used": 0})
            after["preemptions"] = preemptions(server)
            print(f"{ends.total()} requests in {time.monotonic() - start:.0f} s: {dict(ends)}")
            check(before, after, ends)
            if total is not None:
                add_to(total, ends)
        finally:
            server.process.terminate()
        assert server.process.wait(60) == 0


def preemptions(server: ServeProcess) -> float:
    [value] = re.findall(r"^sagellm:num_preemptions_total\S+ (\S+)$", server.http.get("/metrics").text, re.MULTILINE)
    return float(value)


def check(before: dict[str, float], after: dict[str, float], ends: Counter[str]) -> None:
    """Prints the resources, and asserts that they have not grown."""
    for name, value in after.items():
        print(f"  {name:<16} {before.get(name, 0):8.1f} {value:8.1f}")
    for name in ("front threads", "engine threads", "front files", "engine files"):
        assert after[name] <= before[name] + 8, f"{name} grow from {before[name]} to {after[name]}"
    for name in ("front MiB", "engine MiB"):
        assert after[name] <= before[name] * 1.1 + 20, f"{name} grow from {before[name]} to {after[name]}"
    assert ends.keys() <= {"complete", "cancelled"}, ends


def add_to(path: Path, ends: Counter[str]) -> None:
    """Adds the ends of a run that has passed to the file, and prints the sum of all runs."""
    sums = Counter(json.loads(path.read_text()) if path.exists() else {}) + ends + Counter(runs=1)
    path.write_text(json.dumps(sums) + "\n")
    print(f"all runs: {dict(sums)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--cancel", type=float, default=0.3)
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--seconds", type=float, help="of the run at most")
    parser.add_argument("--total", type=Path, help="file with the sums of several runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    run_soak(options.requests, options.cancel, options.concurrency, options.seed, options.seconds, options.total)


if __name__ == "__main__":
    main()
