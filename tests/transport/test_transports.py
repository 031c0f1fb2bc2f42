"""KV transports: pieces arrive as they were sent, or are reported as failed or stopped, and nothing else happens."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from sageLLM.runtime.transport import link, pulse, tcp
from sageLLM.runtime.transport.base import KVTransport, Place, Report
from sageLLM.runtime.transport.channel import answer_challenge, challenge
from sageLLM.runtime.transport.frames import End as PieceEnd
from sageLLM.runtime.transport.frames import Reply, receive_header, send_header
from sageLLM.runtime.transport.handle import End, Handle, SignedHandle, sign
from sageLLM.runtime.transport.memory import MemoryTransport
from sageLLM.runtime.transport.nixl import NixlTransport, has_nixl
from sageLLM.runtime.transport.rows import DigestName
from sageLLM.runtime.transport.shards import (
    Part,
    PoolShape,
    PoolShard,
    map_pool,
    memory_bytes,
    part_of,
    routes_between,
)
from sageLLM.runtime.transport.sockets import discard
from sageLLM.runtime.transport.tcp import TcpTransport

KEY = b"k" * 32
LAYERS, HEADS, WIDTH, BLOCKS = 3, 4, 8, 12
SECONDS = 20.0


@dataclass
class Group:
    """Workers 0 and 1 of some degrees and block sizes, with separate pools, connected by one kind of transport."""

    kind: str
    degrees: tuple[int, int] = (1, 1)
    block_sizes: tuple[int, int] = (4, 4)
    has_values: bool = True
    num_heads: int = HEADS
    pools: list[list[PoolShard]] = field(default_factory=list)
    ends: list[list[KVTransport]] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = [[part_of(rank, tp, LAYERS, self.num_heads) for rank in range(tp)] for tp in self.degrees]
        generator = torch.Generator().manual_seed(1)
        shapes: dict[tuple[int, int], tuple[int, PoolShape]] = {}
        for worker, (own, size) in enumerate(zip(parts, self.block_sizes, strict=True)):
            self.pools.append([])
            whole = torch.rand(2, LAYERS, BLOCKS, size, self.num_heads, WIDTH, generator=generator)
            for rank, part in enumerate(own):
                kind = (len(part.heads), WIDTH)
                shape = PoolShape(LAYERS, BLOCKS, size, kind, kind if self.has_values else None)
                file = os.memfd_create("test")
                os.ftruncate(file, memory_bytes(shape, torch.float32))
                self.files.append(file)
                shapes[worker, rank] = file, shape
                pool = PoolShard(part, size, *map_pool(file, shape, torch.float32))
                for tensors, all_heads in zip((pool.keys, pool.values), whole, strict=True):
                    for tensor, layer in zip(tensors, all_heads, strict=False):
                        tensor.copy_(layer[..., list(part.heads), :])
                self.pools[-1].append(pool)

        def open_pool(worker: int, rank: int) -> PoolShard:
            if self.kind == "same process":
                return self.pools[worker][rank]
            file, shape = shapes[worker, rank]
            return PoolShard(parts[worker][rank], shape.block_size, *map_pool(file, shape, torch.float32))

        for worker, pools in enumerate(self.pools):
            self.ends.append([])
            for rank, pool in enumerate(pools):
                digest: DigestName = "crc32" if self.kind in ("same process", "tcp without a compiler") else "lanes"
                place = Place(worker, rank, 5 + worker, parts, KEY, digest)
                end = self._end(place, open_pool)
                end.register(pool)
                self.ends[-1].append(end)

    @property
    def is_tcp(self) -> bool:
        return self.kind.startswith("tcp")

    def _end(self, place: Place, open_pool: Callable[[int, int], PoolShard]) -> KVTransport:
        if self.is_tcp:
            return TcpTransport(place)
        if self.kind == "nixl":
            return NixlTransport(place, lambda worker, rank: without_memory(open_pool(worker, rank)))
        return MemoryTransport(place, open_pool)

    def handle(self, start: int, num_tokens: int, attempt: int = 0, **changes: int) -> Handle:
        blocks = []
        for size, shift in zip(self.block_sizes, (1, 2), strict=True):
            num = -(-(start + num_tokens) // size) - start // size
            is_run = start == 4  # blocks that follow each other take another path
            blocks.append([*range(shift, shift + num)] if is_run else random.Random(start).sample(range(BLOCKS), num))
        epochs = 5 + changes.get("source_epoch", 0), 6 + changes.get("target_epoch", 0)
        target = blocks[1] if start == 4 else blocks[1][::-1]
        return Handle("r/0", attempt, start, num_tokens, End(0, epochs[0], blocks[0]), End(1, epochs[1], target))

    def addresses(self) -> list[str]:
        return [end.address for end in self.ends[1] if not isinstance(end, MemoryTransport)]

    def push(self, signed: SignedHandle, addresses: list[str] | None = None) -> list[Report]:
        for end in self.ends[0]:
            end.push(signed, addresses or self.addresses())
        return [report for end in self.ends[0] for report in reports_of(end)]

    def check(self, handle: Handle, pushed: list[Report], flip: int = 0) -> list[Report]:
        parts = [[pool.part for pool in pools] for pools in self.pools]
        for rank, end in enumerate(self.ends[1]):
            routes = [route for route in routes_between(*parts) if route.target == rank]
            end.check(sign(handle, KEY), [pushed[route.source].digests[rank] ^ flip for route in routes])
        return [report for end in self.ends[1] for report in reports_of(end)]

    def tokens(self, worker: int, handle: Handle) -> torch.Tensor:
        """[layers, caches, tokens, heads, width] of a piece, put together from the ranks."""
        end = handle.source if worker == 0 else handle.target
        size = self.block_sizes[worker]
        slots = [end.blocks[t // size - handle.start // size] * size + t % size for t in self.range(handle)]
        found = torch.zeros(LAYERS, 1 + self.has_values, len(slots), self.num_heads, WIDTH)
        for pool in self.pools[worker]:
            for layer in range(LAYERS):
                for index, cache in enumerate(pool.caches(layer)):
                    found[layer, index][:, list(pool.part.heads)] = cache.flatten(0, 1)[slots]
        return found

    @staticmethod
    def range(handle: Handle) -> range:
        return range(handle.start, handle.start + handle.num_tokens)

    def close(self) -> None:
        for end in (*self.ends[0], *self.ends[1]):
            end.close()
        for file in self.files:
            os.close(file)


def reports_of(end: KVTransport) -> list[Report]:
    """The next reports but those that renew a lease."""
    while not (found := [report for report in end.poll(SECONDS) if report.kind != "alive"]):
        pass
    return found


def without_memory(pool: PoolShard) -> PoolShard:
    keys, values = ([cache.to("meta") for cache in caches] for caches in (pool.keys, pool.values))
    return PoolShard(pool.part, pool.block_size, keys, values)


MakeGroup = Callable[..., Group]
KINDS = [
    "same process",
    "shared memory",
    "tcp",
    "tcp without a compiler",
    *(["nixl"] if has_nixl() else []),
]  # `make nixl`


@pytest.fixture(params=KINDS)
def make_group(request: pytest.FixtureRequest) -> Iterator[MakeGroup]:
    made: list[Group] = []

    def make(**options: object) -> Group:
        made.append(Group(request.param, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for group in made:
        group.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"degrees": (2, 1)},
        {"degrees": (1, 4)},
        {"degrees": (4, 2), "num_heads": 2},
        {"degrees": (2, 4), "num_heads": 1, "has_values": False},
        {"block_sizes": (4, 8)},
        {"degrees": (2, 4), "block_sizes": (8, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 8), (4, 7), (6, 5)])
def test_a_piece_arrives_whole_and_nothing_else_changes(
    make_group: MakeGroup, options: dict[str, object], start: int, num_tokens: int
) -> None:
    group = make_group(**options)
    handle = group.handle(start, num_tokens)
    before = [[cache.clone() for cache in (*pool.keys, *pool.values)] for pool in group.pools[1]]
    pushed = group.push(sign(handle, KEY))
    assert [report.kind for report in pushed] == ["pushed"] * len(group.ends[0])
    assert [report.kind for report in group.check(handle, pushed)] == ["received"] * len(group.ends[1])
    assert torch.equal(group.tokens(0, handle), group.tokens(1, handle))
    size = group.block_sizes[1]
    written = {handle.target.blocks[t // size - start // size] * size + t % size for t in group.range(handle)}
    others = [slot for slot in range(BLOCKS * size) if slot not in written]
    for pool, old in zip(group.pools[1], before, strict=True):
        for cache, was in zip((*pool.keys, *pool.values), old, strict=True):
            assert torch.equal(cache.flatten(0, 1)[others], was.flatten(0, 1)[others])


def test_every_head_of_a_rank_is_sent_once() -> None:
    for heads in (1, 2, 3, 4, 8):
        for first, second in ((1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 2), (1, 8)):
            if any(heads % tp and tp % heads for tp in (first, second)):
                continue
            sources = [part_of(rank, first, 2, heads) for rank in range(first)]
            targets = [part_of(rank, second, 2, heads) for rank in range(second)]
            routes = routes_between(sources, targets)
            for rank, part in enumerate(targets):
                sent = [head for route in routes if route.target == rank for head in route.heads]
                assert sorted(sent) == list(part.heads), (heads, first, second)


def test_layers_are_routed_between_pipeline_stages() -> None:
    sources = [Part(range(3), range(2)), Part(range(3, 5), range(2))]
    routes = routes_between(sources, [Part(range(5), range(2))])
    assert [(route.source, list(route.layers)) for route in routes] == [(0, [0, 1, 2]), (1, [3, 4])]


def test_corrupted_kv_is_not_received(make_group: MakeGroup) -> None:
    group = make_group()
    handle = group.handle(0, 8)
    with flipping_link(group.addresses()[0]) if group.is_tcp else nullcontext(None) as address:
        pushed = group.push(sign(handle, KEY), None if address is None else [address])
    if not group.is_tcp:
        group.pools[1][0].keys[1][handle.target.blocks[0], 0, 0, 0] += 1.0
    assert [report.kind for report in pushed] == ["pushed"]
    (report,) = group.check(handle, pushed)
    assert (report.kind, report.reason) == ("failed", "the digests of the KV differ")


FLIPPED = 2048
"""The place of the flipped bit in the stream: in the KV, as the frames before it are shorter."""


@contextmanager
def flipping_link(address: str) -> Iterator[str]:
    """The address of a proxy that flips a bit in the KV that it passes on."""
    host, _, port = address.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection((host, int(port))) as server:
                back = threading.Thread(target=pass_on, args=(server, client, False))
                back.start()
                pass_on(client, server, True)
                back.join()

        def pass_on(source: socket.socket, target: socket.socket, flips: bool) -> None:
            passed = 0
            while data := bytearray(source.recv(2**16)):
                at = FLIPPED - passed
                if flips and 0 <= at < len(data):
                    data[at] ^= 1
                passed += len(data)
                target.sendall(data)
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)

        threading.Thread(target=serve, daemon=True).start()
        yield "{}:{}".format(*listener.getsockname())


def test_a_piece_that_has_not_arrived_whole_is_not_received() -> None:
    group = Group("tcp")
    try:
        handle = group.handle(0, 8)
        pushed = group.push(sign(handle, KEY))
        later = group.handle(0, 8, attempt=1)
        assert [report.kind for report in group.check(later, pushed)] == ["failed"]
        assert [report.kind for report in group.check(handle, pushed)] == ["received"]
        assert [report.kind for report in group.check(handle, pushed)] == ["failed"], "a digest counts once"
    finally:
        group.close()


@pytest.mark.parametrize("end", ["source_epoch", "target_epoch"])
def test_a_handle_of_another_epoch_is_refused(make_group: MakeGroup, end: str) -> None:
    group = make_group()
    before = [cache.clone() for cache in group.pools[1][0].keys]
    handle = group.handle(0, 8, **{end: 1})
    pushed = group.push(sign(handle, KEY))
    if end == "target_epoch" and not group.is_tcp:  # copies are one-sided, and the target refuses to check
        pushed = group.check(handle, pushed)
    else:
        assert all(torch.equal(*pair) for pair in zip(before, group.pools[1][0].keys, strict=True))
    assert [report.kind for report in pushed] == ["failed"]


def test_a_forged_handle_is_refused(make_group: MakeGroup) -> None:
    group = make_group()
    before = [cache.clone() for cache in group.pools[1][0].keys]
    signed = sign(group.handle(0, 8), b"x" * 32)
    assert [report.kind for report in group.push(signed)] == ["failed"]
    assert all(torch.equal(*pair) for pair in zip(before, group.pools[1][0].keys, strict=True))


class Closed:
    """A gate that opens layer by layer."""

    def __init__(self) -> None:
        self.steps, self.waiting = threading.Semaphore(0), threading.Semaphore(0)
        self.is_failed = False

    def wait(self, layer: int, seconds: float) -> bool | None:
        self.waiting.release()
        self.steps.acquire()
        return not self.is_failed


def test_layers_are_sent_as_they_are_computed(make_group: MakeGroup) -> None:
    group, gate = make_group(), Closed()
    handle = group.handle(0, 8)
    group.ends[0][0].push(sign(handle, KEY), group.addresses(), gate)
    for layer in range(LAYERS):
        gate.waiting.acquire()
        group.pools[0][0].keys[layer].add_(1.0)  # computed now
        gate.steps.release()
    pushed = reports_of(group.ends[0][0])
    assert [report.kind for report in group.check(handle, pushed)] == ["received"]
    assert torch.equal(group.tokens(0, handle), group.tokens(1, handle))


class Slow:
    """A gate that opens a layer after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self, layer: int, seconds: float) -> bool | None:
        time.sleep(self.seconds)
        return True


def test_a_long_piece_may_take_longer_than_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that arrive one after another are progress, although nothing is answered meanwhile."""
    for module in (link, tcp):
        monkeypatch.setattr(module, "SECONDS", 1.0)
    group = Group("tcp")
    try:
        handle = group.handle(0, 8)
        group.ends[0][0].push(sign(handle, KEY), group.addresses(), Slow(0.6))
        pushed = [one for one in reports_of(group.ends[0][0]) if one.kind != "alive"]
        assert [(one.kind, one.reason) for one in pushed] == [("pushed", "")]
        assert [report.kind for report in group.check(handle, pushed)] == ["received"]
    finally:
        group.close()


def test_an_answer_that_does_not_come_fails_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SECONDS", 1.0)
    group = Group("tcp")
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = "{}:{}".format(*listener.getsockname())
            group.ends[0][0].push(sign(group.handle(0, 8), KEY), [address])
            stream, _ = listener.accept()
        with stream:
            with Connection(os.dup(stream.fileno())) as connection:
                challenge(connection, KEY)
            [report] = reports_of(group.ends[0][0])
            assert report.kind == "failed" and "no answer within 1 s" in report.reason
    finally:
        group.close()


def test_a_piece_that_is_cancelled_in_a_send_has_one_report(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("tcp")
    try:
        end, handle = group.ends[0][0], group.handle(0, 8)
        assert isinstance(end, TcpTransport)
        send = end.copier.send

        def cancelled(*arguments: Any) -> int:
            end.cancel(handle.key)
            return send(*arguments)

        monkeypatch.setattr(end.copier, "send", cancelled)
        assert [one.kind for one in group.push(sign(handle, KEY))] == ["stopped"]
        assert end.poll(0.2) == []
    finally:
        group.close()


def test_a_cancelled_piece_stops_between_two_layers(make_group: MakeGroup) -> None:
    group, gate = make_group(), Closed()
    handle = group.handle(0, 8)
    group.ends[0][0].push(sign(handle, KEY), group.addresses(), gate)
    gate.waiting.acquire()
    for ends in group.ends:
        ends[0].cancel(handle.key)
    for _ in range(LAYERS):
        gate.steps.release()
    assert [reports_of(end)[0].kind for (end,) in group.ends] == ["stopped", "stopped"]
    after = [cache.clone() for cache in group.pools[1][0].keys]
    assert [report.kind for report in group.push(sign(group.handle(0, 8, attempt=1), KEY))] == ["pushed"]
    assert not torch.equal(after[0], group.pools[1][0].keys[0])


def test_a_queue_behind_a_piece_lives_as_long_as_the_piece_goes_on(
    make_group: MakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "ALIVE_SECONDS", 0.02)
    group, gate = make_group(), Closed()
    source, handles = group.ends[0][0], [group.handle(0, 8, attempt) for attempt in range(3)]
    source.push(sign(handles[0], KEY), group.addresses(), gate)
    for handle in handles[1:]:
        source.push(sign(handle, KEY), group.addresses())
    for _ in range(2):
        gate.waiting.acquire()
        await_alive(source, {0, 1, 2})
        await_silence(source)
        gate.steps.release()
    source.cancel(handles[1].key)
    (report,) = reports_of(source)
    assert (report.kind, report.key.attempt) == ("stopped", 1), "the piece before it has not ended"
    for _ in range(LAYERS):
        gate.steps.release()
    found = reports_of(source)
    while len(found) < 2:
        found += reports_of(source)
    assert [(one.kind, one.key.attempt) for one in found] == [("pushed", 0), ("pushed", 2)]


def await_alive(end: KVTransport, attempts: set[int]) -> None:
    """Waits until each of these pieces has shown life."""
    deadline, found = time.monotonic() + SECONDS, set[int]()
    while not attempts <= found:
        assert time.monotonic() < deadline, found
        found |= {one.key.attempt for one in end.poll(0.1) if one.kind == "alive"}


def await_silence(end: KVTransport) -> None:
    """Waits until no piece shows life for many intervals."""
    deadline = time.monotonic() + SECONDS
    while end.poll(0.3):
        assert time.monotonic() < deadline


def test_a_piece_lives_while_its_bytes_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a link that passes little and then nothing; all has been written to the socket before."""
    monkeypatch.setattr(pulse, "ALIVE_SECONDS", 0.02)
    group = Group("tcp")
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            address = "{}:{}".format(*listener.getsockname())
            for attempt in range(40):
                group.ends[0][0].push(sign(group.handle(0, 32, attempt), KEY), [address])
            stream, _ = listener.accept()
        with stream:
            stream.settimeout(SECONDS)
            with Connection(os.dup(stream.fileno())) as connection:
                challenge(connection, KEY)
            for _ in range(3):
                await_silence(group.ends[0][0])  # the buffers are full
                discard(stream, 2**16)
                await_alive(group.ends[0][0], set(range(40)))
    finally:
        group.close()


def test_pieces_are_sent_before_earlier_ones_are_answered() -> None:
    group = Group("tcp")
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = "{}:{}".format(*listener.getsockname())
            for attempt in range(3):
                group.ends[0][0].push(sign(group.handle(0, 8, attempt), KEY), [address])
            stream, _ = listener.accept()
        with stream:
            stream.settimeout(SECONDS)
            with Connection(os.dup(stream.fileno())) as connection:
                challenge(connection, KEY)
            num_ends = 0
            while num_ends < 3:  # nothing has been answered
                header, num_bytes = receive_header(stream)
                discard(stream, num_bytes)
                num_ends += isinstance(header, PieceEnd)
            assert all(one.kind == "alive" for one in group.ends[0][0].poll(0.0))
            send_header(stream, Reply())
            send_header(stream, Reply("no"))
            reports = [one for _ in range(2) for one in reports_of(group.ends[0][0])]
        reports += reports_of(group.ends[0][0])
        assert [(one.kind, one.key.attempt) for one in reports] == [("pushed", 0), ("failed", 1), ("failed", 2)]
    finally:
        group.close()


def test_pieces_after_a_cancelled_one_arrive() -> None:
    group = Group("tcp")
    try:
        cancelled, kept = group.handle(0, 8), group.handle(0, 8, attempt=1)
        before = [cache.clone() for cache in group.pools[1][0].keys]
        group.ends[1][0].cancel(cancelled.key)
        assert [one.kind for one in reports_of(group.ends[1][0])] == ["stopped"]
        (report,) = group.push(sign(cancelled, KEY))
        assert (report.kind, report.reason) == ("failed", "the piece was cancelled")
        assert all(torch.equal(*pair) for pair in zip(before, group.pools[1][0].keys, strict=True))
        pushed = group.push(sign(kept, KEY))
        assert [one.kind for one in group.check(kept, pushed)] == ["received"]
        assert torch.equal(group.tokens(0, kept), group.tokens(1, kept))
    finally:
        group.close()


def test_a_peer_that_is_gone_fails_the_piece_alone() -> None:
    group = Group("tcp")
    try:
        handle = group.handle(0, 8)
        with socket.create_server(("127.0.0.1", 0)) as other:
            free = f"127.0.0.1:{other.getsockname()[1]}"
        group.ends[0][0].push(sign(handle, KEY), [free])
        (report,) = reports_of(group.ends[0][0])
        assert report.kind == "failed" and "ConnectionRefusedError" in report.reason
        assert [one.kind for one in group.push(sign(handle, KEY))] == ["pushed"]
    finally:
        group.close()


def test_a_stream_that_was_idle_for_long_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "SECONDS", 1.0)
    group = Group("tcp")
    try:
        assert [one.kind for one in group.push(sign(group.handle(0, 8), KEY))] == ["pushed"]
        time.sleep(1.5)  # the receiver has closed it
        handle = group.handle(4, 7)
        pushed = group.push(sign(handle, KEY))
        assert [one.kind for one in pushed] == ["pushed"]
        assert [one.kind for one in group.check(handle, pushed)] == ["received"]
    finally:
        group.close()


@pytest.mark.parametrize("num_frames", [40])
def test_malformed_frames_close_their_connection_alone(num_frames: int) -> None:
    """`benchmarks/chaos.py --frames` sends any number of them."""
    from sageLLM.runtime.transport.frames import HEAD, MAGIC

    group = Group("tcp")
    try:
        host, _, port = group.addresses()[0].rpartition(":")
        draw = random.Random(3)
        before = [cache.clone() for cache in group.pools[1][0].keys]
        for index in range(num_frames):
            data = draw.randbytes(draw.randrange(1, 200))
            head = HEAD.pack(MAGIC, draw.randrange(2**20), draw.randrange(2**40))
            with socket.create_connection((host, int(port)), timeout=SECONDS) as stream, suppress(OSError):
                if index % 2:  # half of them come from a process with the key
                    with Connection(os.dup(stream.fileno())) as connection:
                        answer_challenge(connection, KEY)
                stream.sendall(draw.choice([data, head + data]))
                stream.shutdown(socket.SHUT_WR)
                while stream.recv(4096):
                    pass
        assert all(torch.equal(*pair) for pair in zip(before, group.pools[1][0].keys, strict=True))
        assert [one.kind for one in group.push(sign(group.handle(0, 8), KEY))] == ["pushed"]
    finally:
        group.close()
