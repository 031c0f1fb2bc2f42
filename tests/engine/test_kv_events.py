"""KV events over ZeroMQ, read as a router does: by a decoder that knows vLLM's schema only."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.engine.kv_events import END, KVEventPublisher, KVEventsConfig, encoded, read_config
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kv.events import Cleared, KVEventLog, Removed, Stored
from sageLLM.runtime.kv.manager import PagedKVManager

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
BLOCK = 4


class View:
    """The blocks of an engine as a router sees them: by hash, the parent and the tokens."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, list[int]]] = {}
        self.num_removed = 0

    def apply(self, batch: list[Any]) -> None:
        """One batch `[time, events, rank]`; an event is a map with its type."""
        time, events, rank = batch
        assert isinstance(time, float) and rank == 0
        for event in events:
            match event:
                case {"type": "BlockStored", "block_hashes": hashes, "token_ids": tokens, "block_size": size, **rest}:
                    parent = rest["parent_block_hash"]
                    assert len(tokens) == size * len(hashes) and rest["medium"] == "GPU" and rest["lora_id"] is None
                    assert parent is None or parent in self.blocks, "a block before its parent"
                    for i, name in enumerate(hashes):
                        self.blocks[name] = parent, tokens[i * size : (i + 1) * size]
                        parent = name
                case {"type": "BlockRemoved", "block_hashes": hashes}:
                    for name in hashes:
                        del self.blocks[name]
                    self.num_removed += len(hashes)
                case {"type": "AllBlocksCleared"}:
                    self.blocks.clear()
                case _:
                    raise AssertionError(f"unknown event {event}")

    def sequences(self) -> list[list[int]]:
        """The tokens of every block with those of the blocks before it."""
        found = []
        for name in self.blocks:
            tokens: list[int] = []
            parent: int | None = name
            while parent is not None and parent in self.blocks:
                parent, own = self.blocks[parent]
                tokens = [*own, *tokens]
            found.append(tokens)
        return found


@pytest.fixture
def endpoints(tmp_path: Path) -> tuple[str, str]:
    return f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"


@pytest.fixture
def context() -> Iterator["zmq.Context[Any]"]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def replayed(context: "zmq.Context[Any]", endpoint: str, first: int = 0) -> list[tuple[int, list[Any]]]:
    """The batches from a number on, as the replay socket sends them."""
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint)
    socket.send_multipart([b"", first.to_bytes(8, "big")])
    found = []
    while socket.poll(5000):
        _, number, payload = socket.recv_multipart()
        if number == END:
            break
        found.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))
    socket.close(linger=0)
    return found


def until(context: "zmq.Context[Any]", endpoint: str, num: int) -> list[tuple[int, list[Any]]]:
    """The replayed batches when there are as many; the publisher sends them from a thread."""
    for _ in range(50):
        if len(found := replayed(context, endpoint)) >= num:
            return found
    raise AssertionError("batches are missing")


def test_a_router_sees_the_blocks_of_the_prefix_cache(endpoints: tuple[str, str], context: "zmq.Context[Any]") -> None:
    config = {"enable_kv_cache_events": True, "endpoint": endpoints[0], "replay_endpoint": endpoints[1], "topic": "kv"}
    llm = LLM(MODEL, block_size=BLOCK, num_kv_blocks=24, kv_events_config=config, skip_tokenizer=True)
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt_string(zmq.SUBSCRIBE, "kv")
    subscriber.connect(endpoints[0])
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    prompts = [[7, 8, 9, 10, 11, 12, 13, 14, 15, i, i, i, i + 1] for i in range(20, 34)]
    answers = [llm.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    labels = llm.engine.scheduler.kv.prefill.pool._by_label  # completes the step in flight
    num_batches = llm.engine.num_steps  # an upper bound, as a step without events sends nothing
    events = until(context, endpoints[1], 2)
    while len(more := until(context, endpoints[1], len(events))) > len(events):
        events = more
    assert 2 < len(events) <= num_batches + 1
    view = View()
    for number, (seen, batch) in enumerate(events):
        assert seen == number
        view.apply(batch)
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    assert view.num_removed > 0, "the pool is too large for this test"
    sequences = view.sequences()
    assert all(any(tokens == one[: len(tokens)] for one in whole) for tokens in sequences)
    assert view.blocks.keys() == {int.from_bytes(name[-8:], "big") for name in labels}
    topic, number, payload = subscriber.recv_multipart()
    assert (topic, msgspec.msgpack.decode(payload)) == (b"kv", dict(events)[int.from_bytes(number, "big")])
    subscriber.close(linger=0)
    llm.engine.reset_prefix_cache()
    assert until(context, endpoints[1], len(events) + 1)[-1][1][1] == [{"type": "AllBlocksCleared"}]
    llm.close()


def test_consecutive_blocks_are_one_event() -> None:
    names = [bytes([i]) * 32 for i in range(4)]
    events = [
        Stored(names[0], None, (1, 2)),
        Stored(names[1], names[0], (3, 4)),
        Stored(names[3], names[2], (5, 6)),
        Removed(names[0]),
        Removed(names[1]),
        Cleared(),
    ]
    hashes = [int.from_bytes(name[:8], "big") for name in names]
    found = msgspec.to_builtins(encoded(events, 2))
    stored = {"block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None, "type": "BlockStored"}
    assert found == [
        stored | {"block_hashes": hashes[:2], "parent_block_hash": None, "token_ids": [1, 2, 3, 4]},
        stored | {"block_hashes": [hashes[3]], "parent_block_hash": hashes[2], "token_ids": [5, 6]},
        {"type": "BlockRemoved", "block_hashes": hashes[:2], "medium": "GPU"},
        {"type": "AllBlocksCleared"},
    ]


def test_hits_do_not_depend_on_events() -> None:
    managers = [PagedKVManager(12, 2, enable_prefix_caching=True) for _ in range(2)]
    managers[0].record_prefixes(KVEventLog())
    hits = []
    for kv in managers:
        found = []
        for number in range(9):
            tokens = [1, 2, 3, 4, number % 3, number % 3, 5, 6, number % 2]
            kv.track(str(number), tokens, [], "")
            found.append(kv.num_cached_tokens(str(number)))
            kv.admit(str(number), len(tokens))
            kv.publish(str(number), len(tokens))
            kv.free(str(number))
            kv.forget(str(number))
        hits.append(found)
    assert hits[0] == hits[1] and max(hits[0]) > 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "kv_events_config must be a JSON object with vLLM's fields"),
        ({"enable_kv_cache_events": True, "endpiont": "x"}, "Object contains unknown field `endpiont`"),
        ({"enable_kv_cache_events": True, "publisher": "kafka"}, "Invalid enum value 'kafka'"),
    ],
)
def test_a_wrong_config_is_an_error(config: Any, message: str) -> None:
    with pytest.raises(SageError, match=message):
        read_config(config)


def test_events_that_are_not_asked_for() -> None:
    assert read_config(None) is None
    assert read_config('{"enable_kv_cache_events": false}') is None
    assert read_config({"enable_kv_cache_events": True, "publisher": "null"}) is None


def test_an_address_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SageError, match=f"kv_events_config: {endpoint} or None: Address already in use"):
            KVEventPublisher(KVEventsConfig(endpoint=endpoint), BLOCK)


@pytest.mark.parametrize(("host", "warned"), [("*", True), ("127.0.0.1", False)])
def test_a_warning_for_an_open_address(host: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Tokens of prompts are in the events, and ZeroMQ's sockets ask nobody for a key."""
    config = read_config({"enable_kv_cache_events": True, "endpoint": f"tcp://{host}:0", "replay_endpoint": None})
    assert config is not None
    KVEventPublisher(config, 16).close()
    assert ("let a firewall admit the router only" in caplog.text) == warned
