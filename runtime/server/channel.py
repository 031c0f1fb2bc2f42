"""Channels between the front and an engine: to a process over an inherited socket, or to a thread for debugging.

The socket is one end of a pair. It has no address, so only the process that inherits the other end can talk to it, and
messages are decoded to the types of `messages.py` only.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Protocol

import msgspec

from sageLLM.runtime.server.messages import Command, Crashed, Event

HEADER_LEN = 8
END_SECONDS = 5.0

OnEvent = Callable[[Event], None]
OnLost = Callable[[str], None]
Serve = Callable[["SimpleQueue[Command | None]", Callable[[Event], None]], None]


def frame(data: bytes) -> bytes:
    """A message with its length before it."""
    return len(data).to_bytes(HEADER_LEN, "big") + data


class Channel(Protocol):
    """The front's side. `on_event` and `on_lost` are called in the event loop, `on_lost` at most once."""

    async def start(self, on_event: OnEvent, on_lost: OnLost) -> None: ...

    def send(self, command: Command) -> None: ...

    async def close(self) -> None: ...

    @property
    def process_id(self) -> int | None: ...

    @property
    def has_next_event(self) -> bool:
        """Whether another event has arrived after the one that `on_event` has now."""
        ...


class Receiver(asyncio.Protocol):
    """The front's end of the socket: events of the engine as they arrive."""

    def __init__(self, on_event: OnEvent, on_end: Callable[[], None]) -> None:
        self._on_event, self._on_end = on_event, on_end
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._buffer = bytearray()
        self.has_next_event = False

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        messages = self._whole_messages()
        for number, message in enumerate(messages, start=1):
            self.has_next_event = number < len(messages)
            self._on_event(self._decoder.decode(message))

    def _whole_messages(self) -> list[bytes]:
        buffer, messages, start = self._buffer, [], 0
        while len(buffer) >= (body := start + HEADER_LEN):
            end = body + int.from_bytes(buffer[start:body], "big")
            if len(buffer) < end:
                break
            messages.append(bytes(buffer[body:end]))
            start = end
        del buffer[:start]
        return messages

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()


class ProcessChannel:
    """Starts the engine as `python -m module FD`. `spec` is its first message, in a form that the module defines."""

    def __init__(self, module: str, spec: bytes) -> None:
        self._module, self._spec = module, spec
        self._encoder = msgspec.msgpack.Encoder()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self, on_event: OnEvent, on_lost: OnLost) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # A new session, so that Ctrl-C in a terminal reaches the front alone, which drains and ends the engine.
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

        def on_end() -> None:
            if not self._is_closed:
                self._ending = asyncio.create_task(self._report_end(on_lost))

        loop = asyncio.get_running_loop()
        self._transport, self._receiver = await loop.create_connection(lambda: Receiver(on_event, on_end), sock=ours)
        self._transport.write(frame(self._spec))

    @property
    def has_next_event(self) -> bool:
        return self._receiver is not None and self._receiver.has_next_event

    def send(self, command: Command) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(self._encoder.encode(command)))

    async def close(self) -> None:
        """Hangs up; the process ends after its step, or is killed after END_SECONDS."""
        self._is_closed = True
        if self._ending is not None:
            self._ending.cancel()
        if self._transport is not None:
            self._transport.close()
        if self._process is not None:
            await asyncio.to_thread(self._wait, self._process)

    @staticmethod
    def _wait(process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    async def _report_end(self, on_lost: OnLost) -> None:
        on_lost(await asyncio.to_thread(self._describe_end))

    def _describe_end(self) -> str:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        code = self._process.poll()
        if code is None:
            return f"the engine process {self._process.pid} closed its connection"
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"the engine process {self._process.pid} {how}"


class ThreadChannel:
    """Runs the engine in a thread of this process, for debugging: `serve` builds it and returns at the end."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.has_next_event = False

    @property
    def process_id(self) -> int | None:
        return os.getpid()

    async def start(self, on_event: OnEvent, on_lost: OnLost) -> None:
        loop = asyncio.get_running_loop()
        commands: SimpleQueue[Command | None] = SimpleQueue()
        self._commands = commands

        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_event, event)

        def run() -> None:
            try:
                self._serve(commands, send)
            except BaseException as error:
                send(Crashed(f"{type(error).__name__}: {error}"))
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(on_lost, "the engine thread has ended")

        self._thread = threading.Thread(target=run, name="sagellm-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        self._commands.put(command)

    async def close(self) -> None:
        self._commands.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, END_SECONDS)


class EngineSide:
    """The engine process's end: the first frame is its spec, a thread queues the commands, `send` writes events."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._encoder = msgspec.msgpack.Encoder()
        self.commands: SimpleQueue[Command | None] = SimpleQueue()

    def receive_spec(self) -> bytes:
        return self._receive()

    def start_reading(self) -> None:
        threading.Thread(target=self._read, name="sagellm-commands", daemon=True).start()

    def send(self, event: Event) -> None:
        """Raises OSError if the front has hung up."""
        self._socket.sendall(frame(self._encoder.encode(event)))

    def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(Command)
        try:
            while True:
                self.commands.put(decoder.decode(self._receive()))
        except (OSError, EOFError):
            self.commands.put(None)

    def _receive(self) -> bytes:
        return self._exactly(int.from_bytes(self._exactly(HEADER_LEN), "big"))

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = self._socket.recv_into(view[done:])
            if count == 0:
                raise EOFError
            done += count
        return bytes(data)
