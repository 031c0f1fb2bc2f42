"""`sagellm chat`: a conversation with a running server in the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from sageLLM.runtime.core.printable import printable
from sageLLM.runtime.server.http_client import Address, Connection, HttpError

HELP = "/clear begins a new conversation, /quit or Ctrl-D ends; Ctrl-C stops an answer"
MAX_SHOWN = 10**6


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """The arguments of `sagellm chat`. `quick` is one question, whose answer ends the program."""

    url: str
    model: str | None
    system: str | None
    max_tokens: int | None
    temperature: float | None
    api_key: str | None
    quick: str | None


def chat(request: ChatRequest) -> int:
    """Reads questions from stdin, and prints the answers as they come. Exit code 1 if the server cannot be used."""
    try:
        return asyncio.run(_Conversation(request).run())
    except (HttpError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _Conversation:
    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._address = Address.of(request.url.removesuffix("/").removesuffix("/v1"))
        self._headers = {} if request.api_key is None else {"authorization": f"Bearer {request.api_key}"}
        self._messages = self._opening()
        self._model = request.model

    def _opening(self) -> list[dict[str, Any]]:
        return [] if self._request.system is None else [{"role": "system", "content": self._request.system}]

    async def run(self) -> int:
        if self._model is None:
            self._model = (await self._connection().json("GET", "/v1/models"))["data"][0]["id"]
        if self._request.quick is not None:
            await self._ask(self._request.quick)
            return 0
        if sys.stdin.isatty():
            print(f"{self._model} at {self._request.url}; {HELP}", file=sys.stderr)
        async for line in _lines():
            match line.strip():
                case "":
                    continue
                case "/quit" | "/exit":
                    break
                case "/clear":
                    self._messages = self._opening()
                case "/help":
                    print(HELP, file=sys.stderr)
                case text:
                    await self._ask(text)
        return 0

    async def _ask(self, question: str) -> None:
        """Prints the answer, which becomes part of the conversation; Ctrl-C keeps the answer so far."""
        self._messages.append({"role": "user", "content": question})
        answer: list[str] = []
        task = asyncio.create_task(self._answer(answer))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        except HttpError as error:
            self._messages.pop()
            if self._request.quick is not None:
                raise
            print(f"\nerror: {error}", file=sys.stderr)
            return
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        print(flush=True)
        self._messages.append({"role": "assistant", "content": "".join(answer)})

    async def _answer(self, answer: list[str]) -> None:
        body: dict[str, Any] = {"model": self._model, "messages": self._messages, "stream": True}
        for name, value in (("max_tokens", self._request.max_tokens), ("temperature", self._request.temperature)):
            if value is not None:
                body[name] = value
        async for event in self._connection().events("/v1/chat/completions", body):
            for choice in event["choices"]:
                delta = choice["delta"]
                text = delta.get("content") or ""
                answer.append(text)
                print(printable(delta.get("reasoning") or text, MAX_SHOWN), end="", flush=True)

    def _connection(self) -> Connection:
        return Connection(self._address, self._headers)


async def _lines() -> AsyncIterator[str]:
    """Lines of stdin, read in a thread so that the loop goes on; with a prompt on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield await asyncio.to_thread(input, prompt)
        except EOFError:
            return
