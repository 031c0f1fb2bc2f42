"""Timeline of the steps of prefill and decode workers and of the transfers between them, for Perfetto.

In the Trace Event Format (Google, 2016) a worker is a process with a thread for its steps and one for the transfers to
it. An arrow leads from the step of the source that a piece follows to the piece, and from there to the next step of
the target. Times are microseconds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.scheduler.transfer_commands import PieceId, PushPiece

STEPS, TRANSFERS = 0, 1
"""The threads of a worker."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a worker: what it computed, from its submission, or the end of the step before, to its end."""

    worker: int
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """A piece that was verified, from the command to push it to the report of the last rank.

    With `by_layer` it was pushed while its step ran.
    """

    id: PieceId
    source: int
    target: int
    num_tokens: int
    start: float
    end: float
    by_layer: bool


class Timeline:
    """Records steps and transfers while an engine serves."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.transfers: list[Transfer] = []
        self._last_end: dict[int, float] = {}
        self._pushed: dict[PieceId, tuple[PushPiece, float, bool]] = {}

    def end_step(self, worker: int, name: str, submitted: float) -> None:
        """A step has just ended; a worker computes its steps one after another."""
        start, end = max(submitted, self._last_end.get(worker, 0.0)), time.monotonic()
        self._last_end[worker] = end
        self.steps.append(Step(worker, name, start, end))

    def push(self, command: PushPiece, *, by_layer: bool) -> None:
        """A piece begins, with `by_layer` before the step that computes it."""
        self._pushed[command.id] = command, time.monotonic(), by_layer

    def end_piece(self, piece: PieceId, *, has_arrived: bool) -> None:
        """A piece has been verified, or has ended otherwise."""
        command, start, by_layer = self._pushed.pop(piece, (None, 0.0, False))
        if command is not None and has_arrived:
            num_tokens = command.piece.num_tokens
            ends = start, time.monotonic()
            self.transfers.append(Transfer(piece, command.source, command.target, num_tokens, *ends, by_layer))

    def to_json(self, roles: Sequence[Role]) -> str:
        """The trace, with the workers' current roles in their names."""
        events = [*_names(roles), *map(_step, self.steps)]
        for number, transfer in enumerate(self.transfers):
            events += [_transfer(transfer), *self._arrows(number, transfer)]
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))

    def _arrows(self, number: int, transfer: Transfer) -> Iterator[dict[str, Any]]:
        after = [one for one in self.steps if one.worker == transfer.target and one.start >= transfer.end]
        if (moment := self._sent_at(transfer)) is not None:
            end = max(moment, transfer.start)
            yield from _arrow(f"{number}.sent", transfer.source, STEPS, moment, transfer.target, end)
        if after:
            start = min(one.start for one in after)
            yield from _arrow(f"{number}.used", transfer.target, TRANSFERS, transfer.end, transfer.target, start, STEPS)

    def _sent_at(self, transfer: Transfer) -> float | None:
        """The beginning of the step that computes a piece by layer, otherwise the end of the step before the piece."""
        steps = [one for one in self.steps if one.worker == transfer.source]
        if transfer.by_layer:
            return next((max(one.start, transfer.start) for one in steps if one.end > transfer.start), None)
        return next((one.end for one in reversed(steps) if one.end <= transfer.start), None)


def _names(roles: Sequence[Role]) -> Iterator[dict[str, Any]]:
    for worker, role in enumerate(roles):
        yield _name("process_name", worker, STEPS, f"{role} worker {worker}")
        yield _name("thread_name", worker, STEPS, "steps")
        yield _name("thread_name", worker, TRANSFERS, "KV from other workers")


def _name(event: str, worker: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": event, "ph": "M", "pid": worker, "tid": thread, "args": {"name": name}}


def _step(step: Step) -> dict[str, Any]:
    return _slice(step.name, step.worker, STEPS, step.start, step.end, {})


def _transfer(transfer: Transfer) -> dict[str, Any]:
    args = {"request": transfer.id.request_id, "first_token": transfer.id.start, "attempt": transfer.id.attempt}
    name = f"{transfer.num_tokens} tokens of request {transfer.id.request_id}"
    return _slice(name, transfer.target, TRANSFERS, transfer.start, transfer.end, args | {"source": transfer.source})


def _slice(name: str, worker: int, thread: int, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    duration = round((end - start) * 1e6, 1)
    return {"name": name, "ph": "X", "pid": worker, "tid": thread, "ts": _us(start), "dur": duration, "args": args}


def _arrow(
    name: str, worker: int, thread: int, start: float, target: int, end: float, target_thread: int = TRANSFERS
) -> Iterator[dict[str, Any]]:
    ends = ("s", worker, thread, start), ("f", target, target_thread, end)
    for kind, process, own_thread, moment in ends:
        event = {"name": "KV", "cat": "KV", "ph": kind, "id": name, "bp": "e"}
        yield {**event, "pid": process, "tid": own_thread, "ts": _us(moment)}


def _us(moment: float) -> float:
    return round(moment * 1e6, 1)
