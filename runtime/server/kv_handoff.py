"""The part of an engine process in the handoff of prompts between engines: keeps KV, or fetches it before a request."""

from __future__ import annotations

from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from sageLLM.runtime.engine.kv_exchange import KVFetcher, KVKeeper
from sageLLM.runtime.engine.sequences import RequestGroup, Sequence
from sageLLM.runtime.server.messages import Arrived, Command, HandoffSpec, Submit
from sageLLM.runtime.transport.ticket import TicketError, open_ticket, seal
from sageLLM.runtime.worker.faults import LOG

if TYPE_CHECKING:
    from sageLLM.runtime.engine.engine import Engine


class Waiting(NamedTuple):
    """A request that waits for its KV."""

    command: Submit
    group: RequestGroup


class KVHandoff:
    """Keeps the KV of the prompts of a prefill engine, or fetches that of a decode engine's, for the engine's loop."""

    def __init__(
        self, engine: Engine, spec: HandoffSpec, commands: SimpleQueue[Command | None], key: bytes, weights: str
    ) -> None:
        """`weights` is a digest of them. Raises SageError for an engine that cannot exchange KV."""
        self._key, self._policy, self._commands = key, spec.policy, commands
        self._keeper = KVKeeper(engine, self._key, weights, spec.host) if spec.role == "prefill" else None
        self._fetcher = KVFetcher(engine, self._key, weights, spec.host) if spec.role == "decode" else None
        self._waiting: dict[str, Waiting] = {}

    def delays(self, command: Submit, group: RequestGroup) -> bool:
        """Whether the request waits for its KV; a command `Arrived` follows then."""
        if self._fetcher is None or not command.kv_ticket:
            return False
        salt = group.sequences[0].request.kv_salt
        try:
            ticket = open_ticket(command.kv_ticket, self._key)
            name = self._fetcher.begin(ticket, command.token_ids, salt, self._on_end)
        except TicketError as error:
            LOG.warning("the KV of request %s is not fetched: the ticket is refused, %s", command.request_id, error)
            return False
        if name is not None:
            self._waiting[name] = Waiting(command, group)
        return name is not None

    def _on_end(self, name: str, num_arrived: int, reason: str) -> None:
        self._commands.put(Arrived(name, num_arrived, reason))

    def take(self, arrived: Arrived) -> tuple[Waiting | None, str | None]:
        """The request that waited, unless it was aborted, and the reason if it must fail."""
        assert self._fetcher is not None
        self._fetcher.finish(arrived.name, arrived.num_tokens)
        waiting = self._waiting.pop(arrived.name, None)
        if not arrived.reason or waiting is None:
            return waiting, None
        LOG.warning("the KV of request %s was not fetched: %s", waiting.command.request_id, arrived.reason)
        return waiting, arrived.reason if self._policy == "fail" else None

    def forget(self, request_id: str) -> bool:
        """An aborted request does not wait any more, and its copy ends by itself; false if it does not wait."""
        found = [name for name, one in self._waiting.items() if one.command.request_id == request_id]
        for name in found:
            del self._waiting[name]
        return bool(found)

    def ticket_for(self, answer: Sequence) -> str | None:
        """Keeps the KV of an answer's prompt, and returns the ticket for it; None in another role."""
        if self._keeper is None:
            return None
        request = answer.request
        ticket = self._keeper.keep(request.request_id, list(request.prompt_token_ids), request.kv_salt)
        return seal(ticket, self._key)

    def advance(self) -> None:
        """Between two steps: releases KV, and starts copies that waited for a step."""
        if self._keeper is not None:
            self._keeper.release_due()
        if self._fetcher is not None:
            self._fetcher.start_ready()

    def reset(self) -> list[str]:
        """The engine has started with an empty scheduler; returns the requests that do not wait any more."""
        ended = [one.command.request_id for one in self._waiting.values()]
        self._waiting.clear()
        if self._keeper is not None:
            self._keeper.reset()
        if self._fetcher is not None:
            self._fetcher.reset()
        return ended

    def close(self) -> None:
        for one in (self._keeper, self._fetcher):
            if one is not None:
                one.close()
