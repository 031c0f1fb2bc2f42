"""Prompts that one engine process computes and another one decodes: real processes, KV over TCP, and their failures."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.serve_engine import EngineSpec, encode_spec
from sageLLM.runtime.errors import RequestError, SageError
from sageLLM.runtime.server.channel import ProcessChannel
from sageLLM.runtime.server.engine_client import EngineClient, Inbox
from sageLLM.runtime.server.messages import Delta, HandoffSpec, Submit
from sageLLM.runtime.transport.ticket import open_ticket, seal

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
KEY = "k" * 32
BLOCK_SIZE = 16
PROMPTS = [[3 + (7 * i + j * j) % 300 for j in range(length)] for i, length in enumerate((1, 16, 40, 100, 161))]
PARAMS = SamplingParams(max_tokens=12, temperature=0)
FEW = SamplingParams(max_tokens=1, temperature=0)
Role = Literal["prefill", "decode"]
SECONDS = 120


class Answer(NamedTuple):
    """The tokens of an answer, the tokens of its prompt that were not computed, and the ticket of a prefill engine."""

    token_ids: tuple[int, ...]
    num_cached: int
    ticket: str


def make_client(
    role: Role, policy: Literal["recompute", "fail"] = "recompute", model: Path = MODEL, **options: Any
) -> EngineClient:
    engine = EngineOptions(max_model_len=256, dtype="float32", block_size=BLOCK_SIZE, **options)
    spec = EngineSpec(str(model), engine, handoff=HandoffSpec(role, policy=policy))
    return EngineClient(lambda: ProcessChannel("sageLLM.runtime.cli.serve_engine", encode_spec(spec)))


async def ask(client: EngineClient, prompt: list[int], params: SamplingParams, ticket: str = "") -> Answer:
    inbox, name = Inbox(), client.new_id()
    client.submit(Submit(name, prompt, params, kv_ticket=ticket), inbox)
    found: list[Delta] = []
    while not found or found[-1].finish_reason is None:
        found += await inbox.take()
    client.close_request(name)
    token_ids = tuple(token for delta in found for token in delta.token_ids)
    return Answer(token_ids, found[0].num_cached_tokens or 0, found[-1].kv_ticket or "")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of all engines, with their key."""
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setenv("SAGELLM_KEY", KEY)
        yield runner


@contextmanager
def engine(runner: asyncio.Runner, role: Role, **options: Any) -> Iterator[EngineClient]:
    client = make_client(role, **options)
    runner.run(client.start())
    try:
        yield client
    finally:
        runner.run(client.close())


@pytest.fixture(scope="module")
def prefill(runner: asyncio.Runner) -> Iterator[EngineClient]:
    with engine(runner, "prefill") as client:
        yield client


@pytest.fixture(scope="module")
def decode(runner: asyncio.Runner) -> Iterator[EngineClient]:
    with engine(runner, "decode") as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, max_model_len=256, dtype="float32")


def answers_of(llm: LLM, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in llm.generate(prompts, PARAMS)]


def test_kv_is_fetched_once_and_answers_are_those_of_one_engine(
    runner: asyncio.Runner, prefill: EngineClient, decode: EngineClient, llm: LLM
) -> None:
    async def use() -> None:
        firsts = await asyncio.gather(*(ask(prefill, prompt, FEW) for prompt in PROMPTS))
        found = await asyncio.gather(
            *(ask(decode, prompt, PARAMS, first.ticket) for prompt, first in zip(PROMPTS, firsts, strict=True))
        )
        expected = answers_of(llm, PROMPTS)
        assert [answer.token_ids for answer in found] == expected
        assert [first.token_ids for first in firsts] == [ids[:1] for ids in expected]
        whole = [(len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in PROMPTS]
        assert [answer.num_cached for answer in found] == whole
        again = await ask(decode, PROMPTS[3], PARAMS, firsts[3].ticket)  # all of it is in the cache now
        assert (again.token_ids, again.num_cached) == (expected[3], whole[3])
        longer = [*PROMPTS[4], *range(5, 40)]  # the next turn: the part that is here is not copied again
        ticket = (await ask(prefill, longer, FEW)).ticket
        assert (await ask(decode, longer, PARAMS, ticket)).num_cached == (len(longer) - 1) // BLOCK_SIZE * BLOCK_SIZE

    runner.run(asyncio.wait_for(use(), SECONDS))


def test_kv_of_other_weights_is_not_used(
    runner: asyncio.Runner, decode: EngineClient, llm: LLM, tmp_path: Path
) -> None:
    prompt = [301, *PROMPTS[4]]

    async def use(prefill: EngineClient) -> None:
        ticket = (await ask(prefill, prompt, FEW)).ticket
        found = await ask(decode, prompt, PARAMS, ticket)
        assert (found.token_ids, found.num_cached) == (answers_of(llm, [prompt])[0], 0)

    shutil.copytree(MODEL, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with engine(runner, "prefill", model=path.parent) as other:
        runner.run(asyncio.wait_for(use(other), SECONDS))


async def decode_alone(decode: EngineClient, prompt: list[int], ticket: str) -> None:
    """Asks twice: the answer with a ticket that brings no KV is that with the KV of the first one in the cache."""
    found = await ask(decode, prompt, PARAMS, ticket)
    assert found.num_cached == 0, ticket
    assert (await ask(decode, prompt, PARAMS)).token_ids == found.token_ids


def test_without_kv_the_prompt_is_computed_or_the_request_fails_by_policy(
    runner: asyncio.Runner, prefill: EngineClient, decode: EngineClient, llm: LLM
) -> None:
    prompts = [[302, *PROMPTS[3]], [302, *PROMPTS[4]]]

    async def use(strict: EngineClient) -> None:
        first, second = [await ask(prefill, prompt, FEW) for prompt in prompts]
        ticket = open_ticket(first.ticket, KEY.encode())
        others = [
            "not a ticket",
            seal(ticket, b"another key of some length"),
            seal(replace(ticket, epoch=ticket.epoch + 1), KEY.encode()),
            seal(replace(ticket, request_id="unknown"), KEY.encode()),
            second.ticket,  # that of another prompt
        ]
        for index, one in enumerate(others):
            await decode_alone(decode, [index, *prompts[0]], one)
        assert prefill.process_id is not None
        os.kill(prefill.process_id, signal.SIGKILL)
        found = await ask(decode, prompts[1], PARAMS, second.ticket)
        assert (found.token_ids, found.num_cached) == (answers_of(llm, prompts[1:])[0], 0)
        with pytest.raises(RequestError, match="the KV of the prompt was not fetched: "):
            await ask(strict, prompts[1], PARAMS, second.ticket)

    with engine(runner, "decode", policy="fail") as strict:
        runner.run(asyncio.wait_for(use(strict), SECONDS))


def test_an_engine_without_a_key_is_refused(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_KEY", "short")
    with (
        pytest.raises(SageError, match="shared key of at least 16 characters, got 5"),
        engine(runner, "prefill"),
    ):
        raise AssertionError("the engine has started")
