"""The KV of prompts that an engine keeps for others: it is released when it has expired, and when too much is kept."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from msgspec.structs import replace

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.engine.kv_exchange import KVFetcher, KVKeeper
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.transport import channel
from sageLLM.runtime.transport.ticket import NotFetched, Ticket, TicketError, decode_answer

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
KEY = b"k" * 32
WEIGHTS = "a digest"
PROMPTS = [[number, *range(3, 66)] for number in range(100, 110)]
NUM_BLOCKS = 24  # of 16 tokens; a prompt has 4


@pytest.fixture
def llm() -> Iterator[LLM]:
    llm = LLM(MODEL, max_model_len=256, num_kv_blocks=NUM_BLOCKS, skip_tokenizer=True)
    llm.generate(PROMPTS, SamplingParams(max_tokens=1, temperature=0))
    yield llm
    llm.close()


def num_used(llm: LLM) -> int:
    return llm.engine.kv_stats()["worker"].num_used


def test_kv_is_released_when_it_has_expired(llm: LLM) -> None:
    keeper = KVKeeper(llm.engine, KEY, WEIGHTS, keep_seconds=1.0)
    keeper.keep("a", PROMPTS[-1], "")
    assert num_used(llm) == 4
    time.sleep(1.1)
    keeper.release_due()
    assert num_used(llm) == 0
    keeper.close()


def test_at_most_half_of_the_pool_is_kept(llm: LLM) -> None:
    keeper = KVKeeper(llm.engine, KEY, WEIGHTS)
    for number in (-4, -3, -2, -1):  # the latest ones are in the prefix cache
        keeper.keep(str(number), PROMPTS[number], "")
    assert num_used(llm) == 12, "the oldest was released"
    llm.engine.scheduler.kv.decode.check_integrity()
    keeper.close()


def test_the_ticket_of_another_prompt_is_refused(llm: LLM) -> None:
    keeper, fetcher = KVKeeper(llm.engine, KEY, WEIGHTS), KVFetcher(llm.engine, KEY, WEIGHTS)
    ticket = keeper.keep("a", PROMPTS[-1], "")
    assert isinstance(ticket, Ticket)
    with pytest.raises(TicketError, match="that of another prompt"):
        fetcher.begin(ticket, PROMPTS[-2], "", lambda *_: None)
    with pytest.raises(TicketError, match="that of another prompt"):
        fetcher.begin(ticket, PROMPTS[-1], "another salt", lambda *_: None)
    assert fetcher.begin(ticket, PROMPTS[-1], "", lambda *_: None) is None, "all of it is here"
    keeper.close()
    fetcher.close()


def test_a_client_that_stops_in_its_handshake_delays_no_other(llm: LLM) -> None:
    other = LLM(MODEL, max_model_len=256, num_kv_blocks=NUM_BLOCKS, skip_tokenizer=True)
    keeper, fetcher = KVKeeper(llm.engine, KEY, WEIGHTS), KVFetcher(other.engine, KEY, WEIGHTS)
    ends: SimpleQueue[tuple[str, int, str]] = SimpleQueue()
    with socket.create_connection(keeper.address) as stream:
        stream.sendall(b"\0")  # the beginning of a message that does not come
        ticket = keeper.keep("a", PROMPTS[-1], "")
        name = fetcher.begin(ticket, PROMPTS[-1], "", lambda *end: ends.put(end))
        assert ends.get(timeout=20) == (name, 48, "")
    keeper.close()
    fetcher.close()
    other.close()


def test_a_fetch_ends_as_the_engine_is_closed(llm: LLM) -> None:
    other = LLM(MODEL, max_model_len=256, num_kv_blocks=NUM_BLOCKS, skip_tokenizer=True)
    keeper, fetcher = KVKeeper(llm.engine, KEY, WEIGHTS), KVFetcher(other.engine, KEY, WEIGHTS)
    ends: SimpleQueue[tuple[str, int, str]] = SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ticket = replace(keeper.keep("a", PROMPTS[-1], ""), port=silent.getsockname()[1])
        name = fetcher.begin(ticket, PROMPTS[-1], "", lambda *end: ends.put(end))
        connection, _ = channel.accept(silent, KEY)
        fetcher.close()
        assert ends.get(timeout=20) == (name, 0, "the engine is being closed")
        connection.close()
    keeper.close()
    other.close()


def test_a_reset_ends_fetches_at_once_and_nothing_writes_to_their_blocks(llm: LLM) -> None:
    other = LLM(MODEL, max_model_len=256, num_kv_blocks=NUM_BLOCKS, skip_tokenizer=True)
    keeper, fetcher = KVKeeper(llm.engine, KEY, WEIGHTS), KVFetcher(other.engine, KEY, WEIGHTS)
    pool = other.engine.executor.decoder.runner.pool  # type: ignore[attr-defined]
    ends: SimpleQueue[tuple[str, int, str]] = SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ticket = replace(keeper.keep("a", PROMPTS[-1], ""), port=silent.getsockname()[1])
        name = fetcher.begin(ticket, PROMPTS[-1], "", lambda *end: ends.put(end))
        connection, _ = channel.accept(silent, KEY)
        fetch, before, start = connection.recv_bytes(), [one.clone() for one in pool.keys], time.monotonic()
        fetcher.reset()
        assert time.monotonic() < start + 2
        assert ends.get(timeout=20) == (name, 0, "the engine has lost its KV")
    with channel.connect(*keeper.address, KEY, 5) as late:
        late.send_bytes(fetch)
        assert decode_answer(late.recv_bytes()) == NotFetched("the piece was cancelled")
    assert all(map(torch.equal, pool.keys, before))
    keeper.close()
    fetcher.close()
    other.close()


def test_engines_with_two_pools_are_refused() -> None:
    llm = LLM(MODEL, max_model_len=64, scheduler=PDSchedulerConfig(mode="strict"), skip_tokenizer=True)
    with pytest.raises(SageError, match="engines of one rank and one pool"):
        KVKeeper(llm.engine, KEY, WEIGHTS)
    llm.close()
