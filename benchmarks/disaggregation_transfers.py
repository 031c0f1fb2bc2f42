"""Rates of KV transfers by transport, next to memcpy and a raw socket of the same machine, in one run."""

from __future__ import annotations

import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from sageLLM.runtime.transport.base import KVTransport, Place, Report
from sageLLM.runtime.transport.handle import End, Handle, sign
from sageLLM.runtime.transport.memory import MemoryTransport
from sageLLM.runtime.transport.rows import best_digest
from sageLLM.runtime.transport.shards import PoolShape, PoolShard, map_pool, memory_bytes, part_of
from sageLLM.runtime.transport.tcp import TcpTransport

LAYERS, HEADS, WIDTH, BLOCK_SIZE = 30, 3, 64, 16  # those of the 135M shape
KEY = b"k" * 32
ROUNDS = 11


def measure_bandwidth(num_tokens: int = 2048) -> str:
    """GB/s of a piece of so many tokens in bf16, medians of rounds that alternate; all threads have one priority."""
    torch.set_num_threads(1)
    pools, files = zip(*(_pool(num_tokens) for _ in range(2)), strict=True)
    num_bytes = sum(tensor.nbytes for tensor in (*pools[0].keys, *pools[0].values))
    ways: dict[str, Callable[[], float]] = {
        "memcpy": partial(_memcpy, pools),
        "raw socket": partial(_socket, [_bytes_of(pool) for pool in pools]),
    }
    ends = [_ends(pools, files, is_tcp) for is_tcp in (False, True)]
    for name, pair in zip(("shared memory", "tcp"), ends, strict=True):
        ways[f"{name}, pushed"] = partial(_push, pair, num_tokens, False)
        ways[f"{name}, pushed and checked"] = partial(_push, pair, num_tokens, True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            times[name].append(run())
    rates = {name: num_bytes / statistics.median(found) / 1e9 for name, found in times.items()}
    for end in (*ends[0], *ends[1]):
        end.close()
    lines = [f"{num_tokens} tokens, {num_bytes / 1e6:.0f} MB"]
    for name, rate in rates.items():
        base = rates["raw socket" if "tcp" in name else "memcpy"]
        lines.append(f"{name:<36} {rate:6.2f} GB/s  {rate / base:5.2f}")
    return "\n".join(lines)


def _pool(num_tokens: int) -> tuple[PoolShard, int]:
    shape = PoolShape(LAYERS, num_tokens // BLOCK_SIZE, BLOCK_SIZE, (HEADS, WIDTH), (HEADS, WIDTH))
    file = os.memfd_create("benchmark")
    os.ftruncate(file, memory_bytes(shape, torch.bfloat16))
    keys, values = map_pool(file, shape, torch.bfloat16)
    for tensor in (*keys, *values):
        tensor.normal_()
    return PoolShard(part_of(0, 1, LAYERS, HEADS), BLOCK_SIZE, keys, values), file


def _memcpy(pools: Sequence[PoolShard]) -> float:
    start = time.perf_counter()
    for kind in ("keys", "values"):
        for source, target in zip(getattr(pools[0], kind), getattr(pools[1], kind), strict=True):
            target.copy_(source)
    return time.perf_counter() - start


def _bytes_of(pool: PoolShard) -> list[memoryview]:
    tensors = (*pool.keys, *pool.values)
    return [memoryview(tensor.view(torch.uint8).numpy()).cast("B") for tensor in tensors]  # type: ignore[arg-type]


def _socket(buffers: Sequence[Sequence[memoryview]]) -> float:
    """Sends the memory of a pool from one thread to another over loopback, into that of the other pool."""
    listener = socket.create_server(("127.0.0.1", 0))
    sent, received = buffers

    def receive() -> None:
        stream, _ = listener.accept()
        with stream:
            for buffer in received:
                stream.recv_into(buffer, 0, socket.MSG_WAITALL)
            stream.sendall(b"x")

    thread = threading.Thread(target=receive)
    thread.start()
    with listener, socket.create_connection(listener.getsockname()) as stream:
        start = time.perf_counter()
        for buffer in sent:
            stream.sendall(buffer)
        stream.recv(1)
        seconds = time.perf_counter() - start
    thread.join()
    return seconds


def _ends(pools: Sequence[PoolShard], files: Sequence[int], is_tcp: bool) -> list[KVTransport]:
    parts = [[pool.part] for pool in pools]
    shape = PoolShape(LAYERS, len(pools[0].keys[0]), BLOCK_SIZE, (HEADS, WIDTH), (HEADS, WIDTH))

    def open_pool(worker: int, rank: int) -> PoolShard:
        return PoolShard(parts[worker][rank], BLOCK_SIZE, *map_pool(files[worker], shape, torch.bfloat16))

    ends: list[KVTransport] = []
    for worker, pool in enumerate(pools):
        place = Place(worker, 0, 0, parts, KEY, best_digest())
        ends.append(TcpTransport(place, nice=0) if is_tcp else MemoryTransport(place, open_pool, nice=0))
        ends[-1].register(pool)
    return ends


def _end_of(transport: KVTransport) -> Report:
    """The report that ends a piece; those before it renew its lease."""
    while True:
        for report in transport.poll(60.0):
            if report.kind != "alive":
                return report


def _push(ends: Sequence[KVTransport], num_tokens: int, is_checked: bool) -> float:
    blocks = list(range(num_tokens // BLOCK_SIZE))
    signed = sign(Handle("r", 0, 0, num_tokens, End(0, 0, blocks), End(1, 0, blocks)), KEY)
    target = ends[1]
    start = time.perf_counter()
    ends[0].push(signed, [target.address] if isinstance(target, TcpTransport) else [])
    pushed = _end_of(ends[0])
    assert pushed.kind == "pushed", pushed.reason
    if is_checked:
        target.check(signed, [pushed.digests[0]])
        received = _end_of(target)
        assert received.kind == "received", received.reason
    return time.perf_counter() - start
