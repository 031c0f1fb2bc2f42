"""Servers for the tests: in a thread of this process, with the tiny model or with a scripted engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx2

from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.server.channel import Channel, OnEvent, OnLost, ThreadChannel
from sageLLM.runtime.server.engine_client import EngineClient
from sageLLM.runtime.server.engine_loop import EngineLoop, describe, warm_up
from sageLLM.runtime.server.http_server import bind, run_server, url_of
from sageLLM.runtime.server.messages import Abort, Command, Delta, Event, Ready, Rejected, Step, Submit
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.server.settings import ServerSettings
from sageLLM.runtime.text.tokenizer import Tokenizer

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
NAME = "tiny"


class TestServer:
    """A running server: its URL, its service, and a client."""

    __test__ = False

    def __init__(self, service: Service, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.url, self._loop = service, url, loop
        self.http = httpx2.Client(base_url=url, timeout=60, trust_env=False)

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx2.Response:
        return self.http.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.http.get(path, **options)

    def num_tasks(self) -> int:
        """The tasks of the server's event loop."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result(30)


@cache
def tokenizer() -> Tokenizer:
    """The model's tokenizer, which takes half a second to check and read."""
    return Tokenizer.from_folder(MODEL, max_tokens=512)


@contextmanager
def running(make_channel: Callable[[], Channel], **settings: Any) -> Iterator[TestServer]:
    """A server on a free port; `settings` are those of ServerSettings."""
    loop = asyncio.new_event_loop()
    is_ready, problems = threading.Event(), []
    own = {"port": 0, "access_log": False, "served_model_name": [NAME], "model": str(MODEL)}
    service = Service(ServerSettings(**{**own, **settings}), EngineClient(make_channel))
    service.tokenizer_reader = lambda folder: nullcontext(lambda max_tokens: tokenizer())
    sock = bind(service.settings)
    url = url_of(sock)

    async def main() -> None:
        nonlocal task
        task = asyncio.current_task()
        try:
            await run_server(service, sock, lambda ready, url: is_ready.set())
        except BaseException as error:
            problems.append(error)
            is_ready.set()

    task: asyncio.Task[None] | None = None
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert is_ready.wait(60)
    assert not problems, problems
    server = TestServer(service, url, loop)
    try:
        yield server
    finally:
        server.http.close()
        assert task is not None
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
        assert not thread.is_alive()


def engine_channel(llm: LLM) -> ThreadChannel:
    """A channel to an engine in a thread. The LLM must be used by nobody else meanwhile."""

    def serve(commands: SimpleQueue[Command | None], send: Callable[[Event], None]) -> None:
        warm_up(llm)
        send(describe(llm, "hybrid", "priority", 256))
        EngineLoop(llm, commands, send).run()

    return ThreadChannel(serve)


class ScriptedChannel:
    """An engine under the control of a test: `emit_tokens` sends tokens to a request, `lose` ends the engine."""

    def __init__(self) -> None:
        self.submitted: dict[str, Submit] = {}
        self.aborted: list[Abort] = []
        self.arrived = threading.Semaphore(0)
        self.has_next_event = False
        self.loop: asyncio.AbstractEventLoop

    @property
    def process_id(self) -> int | None:
        return None

    async def start(self, on_event: OnEvent, on_lost: OnLost) -> None:
        self.loop, self._on_event, self._on_lost = asyncio.get_running_loop(), on_event, on_lost
        ready = Ready("llama", 2048, True, 512, 512, 4096, 256, 16, 256, "hybrid", "priority", [])
        self.loop.call_soon(on_event, ready)

    def send(self, command: Command) -> None:
        if isinstance(command, Submit):
            self.submitted[command.request_id] = command
            self.arrived.release()
        elif isinstance(command, Abort):
            self.aborted.append(command)
            self.arrived.release()

    async def close(self) -> None:
        pass

    def emit_tokens(self, request_id: str, token_ids: list[int], reason: str | None = None, **fields: Any) -> None:
        self.emit(Step([Delta(request_id, 0, token_ids, reason, **fields)]))

    def reject(self, request_id: str, message: str, param: str | None = None) -> None:
        self.emit(Rejected(request_id, message, param))

    def emit(self, event: Event) -> None:
        self.loop.call_soon_threadsafe(self._on_event, event)

    def lose(self) -> None:
        self.loop.call_soon_threadsafe(self._on_lost, "the engine process 1 was killed by signal 9")
