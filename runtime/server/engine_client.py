"""The front's view of the engine: submits requests, distributes answers, and starts a lost engine again."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.errors import EngineError, RequestError, SageError
from sageLLM.runtime.server.channel import Channel
from sageLLM.runtime.server.messages import (
    Abort,
    Crashed,
    Delta,
    Embed,
    Embedded,
    Event,
    Load,
    Ready,
    Refused,
    Rejected,
    RoleAccepted,
    SetRole,
    SetTokenizer,
    Step,
    StepFailed,
    Submit,
)

LOG = logging.getLogger("sagellm")

State = Literal["starting", "ready", "lost", "closed"]
FIRST_RESTART_SECONDS = 0.1
MAX_RESTARTS = 5
"""Consecutive failed starts after which the server ends."""


class EngineLostError(EngineError):
    """The engine ended while it had the request."""


class Inbox:
    """The deltas that a handler has not taken yet, of one or more requests. `take` waits for new ones.

    While the handler waits, `sink` is offered the deltas that arrive, and returns whether it has dealt with them.
    """

    __slots__ = ("_deltas", "_error", "_waiter", "sink")

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None  # of the only handler
        self.sink: Callable[[list[Delta]], bool] | None = None

    def push(self, deltas: list[Delta]) -> None:
        waiter = self._waiter
        if waiter is not None:
            if self.sink is not None and self._is_taken(self.sink, deltas):
                return
            self._wake(waiter)
        self._deltas += deltas

    def _is_taken(self, sink: Callable[[list[Delta]], bool], deltas: list[Delta]) -> bool:
        try:
            return sink(deltas)
        except Exception as error:  # of this request, not of the engine's connection
            self.fail(error)
            return True

    def fail(self, error: Exception) -> None:
        self._error = error
        if self._waiter is not None:
            self._wake(self._waiter)

    async def take(self) -> list[Delta]:
        """All new deltas, at least one. Raises RequestError for an invalid request, EngineError for a failed step."""
        if not self._deltas and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._deltas:
            deltas, self._deltas = self._deltas, []
            return deltas
        assert self._error is not None
        raise self._error

    def _wake(self, waiter: asyncio.Future[None]) -> None:
        self._waiter = None
        if not waiter.done():
            waiter.set_result(None)


class EngineClient:
    """Sends requests to the engine over a channel. `make_channel` is called for every start."""

    def __init__(self, make_channel: Callable[[], Channel]) -> None:
        self._make_channel = make_channel
        self._channel: Channel | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._arrived: dict[Inbox, list[Delta]] = {}  # not handed over yet
        self._replies: dict[str, asyncio.Future[Any]] = {}  # of commands with one reply
        self._started: asyncio.Future[Ready] | None = None
        self._tokenizer: SetTokenizer | None = None
        self._restarting: asyncio.Task[None] | None = None
        self.state: State = "starting"
        self.ready: Ready | None = None
        self.load: Load | None = None
        self.num_restarts = 0
        self.on_load: Callable[[Load], None] = lambda load: None
        self.on_lost: Callable[[], None] = lambda: None
        self.gave_up = asyncio.Event()
        self._ids = itertools.count()

    @property
    def process_id(self) -> int | None:
        return None if self._channel is None else self._channel.process_id

    @property
    def num_requests(self) -> int:
        """The requests that the engine has."""
        return len(self._inboxes) + len(self._replies)

    async def start(self) -> Ready:
        """Raises SageError if an input of the user prevents the start, and EngineError for any other reason."""
        self.state = "starting"
        self._started = asyncio.get_running_loop().create_future()
        self._channel = channel = self._make_channel()
        await channel.start(lambda event: self._on_event(channel, event), lambda reason: self._on_lost(channel, reason))
        try:
            self.ready = ready = await self._started
        except BaseException:
            await channel.close()
            raise
        if self._tokenizer is not None:
            channel.send(self._tokenizer)
        self.state = "ready"
        return ready

    async def close(self) -> None:
        self.state = "closed"
        if self._restarting is not None:
            self._restarting.cancel()
        self._fail_all(EngineError("the server is shutting down"))
        if self._channel is not None:
            await self._channel.close()

    def abort_all(self, reason: str) -> None:
        """Fails all requests with an EngineError."""
        self._fail_all(EngineError(reason))

    def set_tokenizer(self, command: SetTokenizer) -> None:
        """Facts that the engine does not know, also for an engine that is started again."""
        self._tokenizer = command
        assert self._channel is not None
        self._channel.send(command)

    def new_id(self) -> str:
        """An id for the engine. The ids that clients choose may be equal."""
        return str(next(self._ids))

    def submit(self, command: Submit, inbox: Inbox) -> None:
        """Queues a request with its answers going to the inbox. Raises EngineError unless the engine is ready."""
        self._require_ready()
        self._inboxes[command.request_id] = inbox
        self._send(command)

    def close_request(self, request_id: str) -> None:
        """Aborts a request unless it has ended. To be called once the handler takes no more deltas."""
        if self._inboxes.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    def abort_answer(self, request_id: str, index: int) -> None:
        self._send(Abort(request_id, index))

    def finish(self, request_id: str) -> None:
        """Forgets a request with answers that have all ended."""
        self._inboxes.pop(request_id, None)

    async def embed(self, command: Embed) -> list[npt.NDArray[np.float32]]:
        """Raises RequestError or EngineError."""
        return [np.frombuffer(one, np.float32) for one in await self._ask(command)]

    async def set_role(self, command: SetRole) -> None:
        """Returns when the worker has the role or drains for it. Raises RequestError and EngineError."""
        await self._ask(command)

    async def _ask(self, command: Embed | SetRole) -> Any:
        self._require_ready()
        future = self._replies[command.request_id] = asyncio.get_running_loop().create_future()
        self._send(command)
        try:
            return await future
        finally:
            self._replies.pop(command.request_id, None)

    def _require_ready(self) -> None:
        if self.state != "ready":
            raise EngineLostError(f"the engine is not ready ({self.state})")

    def _send(self, command: Submit | Abort | Embed | SetRole) -> None:
        if self._channel is not None and self.state == "ready":
            self._channel.send(command)

    # --- events ---

    def _on_event(self, channel: Channel, event: Event) -> None:
        if channel is not self._channel:
            return
        if not isinstance(event, Step):
            self._deliver()
        match event:
            case Step(deltas=deltas, load=load):
                for delta in deltas:
                    if (inbox := self._inboxes.get(delta.request_id)) is not None:
                        self._arrived.setdefault(inbox, []).append(delta)
                if not channel.has_next_event:
                    self._deliver()
                if load is not None:
                    self.load = load
                    self.on_load(load)
            case Rejected(request_id=request_id, message=message, param=param):
                self._fail(request_id, RequestError(message, param))
            case Embedded(request_id=request_id, vectors=vectors):
                self._reply(request_id, vectors)
            case RoleAccepted(request_id=request_id):
                self._reply(request_id, None)
            case StepFailed(request_ids=request_ids, message=message):
                for request_id in request_ids:  # the engine has others in its queue
                    self._fail(request_id, EngineError(message))
            case Ready():
                self._settle_start(event)
            case Refused(message=message):
                self._settle_start(SageError(message))
            case Crashed(message=message):
                LOG.error("the engine crashed: %s", message)
                self._settle_start(EngineError(message))

    def _deliver(self) -> None:
        """Hands over what has arrived: deltas of several steps at once, if they arrived together."""
        arrived, self._arrived = self._arrived, {}
        for inbox, deltas in arrived.items():
            inbox.push(deltas)

    def _settle_start(self, result: Ready | Exception) -> None:
        if self._started is None or self._started.done():
            return
        if isinstance(result, Exception):
            self._started.set_exception(result)
        else:
            self._started.set_result(result)

    def _on_lost(self, channel: Channel, reason: str) -> None:
        if channel is not self._channel or self.state == "closed":
            return
        self._deliver()
        if self.state == "starting":
            self._settle_start(EngineError(reason))
            return
        LOG.error("%s; %d requests have failed, and the engine is started again", reason, self.num_requests)
        self.state, self.load = "lost", None
        self._fail_all(EngineLostError(f"{reason}; send the request again"))
        self.on_lost()
        self._restarting = asyncio.create_task(self._restart(channel))

    async def _restart(self, lost: Channel) -> None:
        await lost.close()
        for attempt in range(MAX_RESTARTS):
            await asyncio.sleep(FIRST_RESTART_SECONDS * 4**attempt)
            try:
                await self.start()
            except (SageError, EngineError, OSError) as error:
                LOG.error("the engine does not start: %s", error)
                self.state = "lost"
                continue
            self.num_restarts += 1
            LOG.warning("the engine runs again, as process %s", self.process_id)
            return
        LOG.critical("the engine did not start %d times; the server ends", MAX_RESTARTS)
        self.gave_up.set()

    def _reply(self, request_id: str, value: Any) -> None:
        if (future := self._replies.get(request_id)) is not None and not future.done():
            future.set_result(value)

    def _fail(self, request_id: str, error: Exception) -> None:
        if (inbox := self._inboxes.pop(request_id, None)) is not None:
            inbox.fail(error)
        if (future := self._replies.get(request_id)) is not None and not future.done():
            future.set_exception(error)

    def _fail_all(self, error: Exception) -> None:
        for request_id in [*self._inboxes, *self._replies]:
            self._fail(request_id, error)
