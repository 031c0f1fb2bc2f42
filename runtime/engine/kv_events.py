"""Publishes the events of the prefix cache over ZeroMQ, in the form of vLLM's KV events.

A message has three frames: the topic, a sequence number (8 bytes, big endian), and a msgpack batch
`[time, events, rank]`. An event is a map with its `type`: BlockStored, BlockRemoved or AllBlocksCleared. A subscriber
that has missed messages sends the number of the first one to the replay socket, and receives the batches from there on,
and an end marker with the number -1. Block hashes are the last 64 bits of the block names
(`runtime/kv/hash_chain.py`), which are equal for equal prefixes of equal salts.
"""

import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kv.events import Cleared, KVEvent, KVEventLog, Removed, Stored

LOG = logging.getLogger("sagellm")
MEDIUM = "GPU"
"""The tier of a block in vLLM's events; it means the memory of the device, whatever that is."""
END = (-1).to_bytes(8, "big", signed=True)
POLL_MS = 100
HASH_BYTES = 8


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, frozen=True):
    """Consecutive blocks of a sequence that can be found from now on."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, frozen=True):
    """Blocks that were evicted."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, tag=True, frozen=True):
    """No block can be found any more."""


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, frozen=True):
    """Events of a step, in order."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class KVEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of vLLM's `--kv-events-config`."""

    enable_kv_cache_events: bool = False
    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""


def read_config(config: str | dict[str, Any] | None) -> KVEventsConfig | None:
    """The config of a JSON text or a dict; None if it publishes nothing. SageError for an invalid one."""
    if config is None:
        return None
    try:
        data = json.loads(config) if isinstance(config, str) else config
        found = msgspec.convert(data, KVEventsConfig)
    except (ValueError, msgspec.ValidationError) as error:
        raise SageError(f"kv_events_config must be a JSON object with vLLM's fields: {error}") from None
    return found if found.enable_kv_cache_events and found.publisher == "zmq" else None


def encoded(events: Sequence[KVEvent], block_size: int) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
    """The events as messages. Blocks that follow each other in a sequence, or are evicted together, are one event."""
    found: list[BlockStored | BlockRemoved | AllBlocksCleared] = []
    last: bytes | None = None
    for event in events:
        previous = found[-1] if found else None
        match event:
            case Stored(name, parent, token_ids):
                if isinstance(previous, BlockStored) and parent is not None and parent == last:
                    previous.block_hashes.append(_hash(name))
                    previous.token_ids.extend(token_ids)
                else:
                    before = None if parent is None else _hash(parent)
                    found.append(BlockStored([_hash(name)], before, list(token_ids), block_size, None, MEDIUM, None))
                last = name
            case Removed(name):
                if isinstance(previous, BlockRemoved):
                    previous.block_hashes.append(_hash(name))
                else:
                    found.append(BlockRemoved([_hash(name)], MEDIUM))
            case Cleared():
                found.append(AllBlocksCleared())
    return found


def _hash(name: bytes) -> int:
    return int.from_bytes(name[-HASH_BYTES:], "big")


class KVEventPublisher:
    """Sends the events of `log` in a thread, so that no step waits for a subscriber."""

    def __init__(self, config: KVEventsConfig, block_size: int) -> None:
        """Raises SageError if an address cannot be used, or pyzmq is missing."""
        try:
            import zmq
        except ModuleNotFoundError:
            raise SageError("kv_events_config requires pyzmq; pip install 'sagellm[kv-events]'") from None
        self.log = KVEventLog()
        self._block_size = block_size
        self._topic = config.topic.encode()
        self._queue: queue.Queue[KVEventBatch | None] = queue.Queue(config.max_queue_size)
        self._sent: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._numbers = count()
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        self._replay = None if config.replay_endpoint is None else self._context.socket(zmq.ROUTER)
        try:
            _open(self._pub, config.endpoint)
            if self._replay is not None and config.replay_endpoint is not None:
                self._replay.bind(config.replay_endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise SageError(f"kv_events_config: {config.endpoint} or {config.replay_endpoint}: {error}") from None
        for endpoint in filter(is_open, (config.endpoint, config.replay_endpoint)):
            LOG.warning("other hosts can read prompts at %s; let a firewall admit the router only", endpoint)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Sends the events since the last call; if the queue is full, drops them, and leaves a gap in the numbers."""
        events = self.log.take()
        if not events:
            return
        batch = KVEventBatch(time.time(), encoded(events, self._block_size), 0)
        try:
            self._queue.put_nowait(batch)
        except queue.Full:
            next(self._numbers)

    def close(self) -> None:
        """Sends what is queued, and closes the sockets."""
        self._queue.put(None)
        self._thread.join(timeout=5)
        self._context.destroy(linger=500)

    def _run(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        while True:
            if self._replay is not None and self._replay.poll(0):
                self._answer_replay()
            try:
                batch = self._queue.get(timeout=POLL_MS / 1e3)
            except queue.Empty:
                continue
            if batch is None:
                return
            number, payload = next(self._numbers).to_bytes(8, "big"), encoder.encode(batch)
            self._sent.append((number, payload))
            self._pub.send_multipart((self._topic, number, payload))

    def _answer_replay(self) -> None:
        """Sends the batches from a number on; a request of another form is ignored."""
        assert self._replay is not None
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            return
        peer, _, first = frames
        for number, payload in self._sent:
            if number >= first:
                self._replay.send_multipart((peer, b"", number, payload))
        self._replay.send_multipart((peer, b"", END, b""))


def is_open(endpoint: str | None) -> bool:
    """Whether other hosts can connect to an address of this one: one of all interfaces."""
    return endpoint is not None and urlsplit(endpoint).hostname in ("*", "0.0.0.0", "::")


def _open(socket: Any, endpoint: str) -> None:
    """Binds to an address of this host, as vLLM does by `*`, and to loopback; connects to others."""
    is_own = any(mark in endpoint for mark in ("*", "::", "ipc://", "inproc://", "127.0.0.1", "localhost"))
    (socket.bind if is_own else socket.connect)(endpoint)
