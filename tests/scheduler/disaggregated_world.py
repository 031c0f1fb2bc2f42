"""Simulated prefill and decode workers, links and faults, under virtual time, for `DisaggregatedScheduler`.

Workers execute the steps that the real schedulers plan on blocks whose contents are hashes of the tokens up to each
position, and read every position that a step depends on. So a copy that is lost, late, doubled or corrupted and not
noticed, or a block that is reused too early, changes the tokens of an answer.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.batch import ScheduleOutput
from sageLLM.runtime.scheduler.disaggregated import DisaggregatedScheduler
from sageLLM.runtime.scheduler.group_transfers import LoadFailurePolicy
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.request import Request, RequestStatus
from sageLLM.runtime.scheduler.transfer import TransferConfig
from sageLLM.runtime.scheduler.transfer_commands import CancelPiece, PieceId, PushPiece

Transport = Literal["memory", "tcp"]
STEP_S, COPY_S, MESSAGE_S, RESTART_S, LEASE_S = 0.02, 0.01, 0.001, 1.0, 0.5
NUM_LAYERS = 2
CHECK_EVERY = 8
EMPTY = -1


def chain(tokens: list[int]) -> list[int]:
    """The contents of the KV of each token: they depend on all tokens up to it."""
    return list(accumulate(tokens, lambda before, token: hash((before, token)), initial=0))[1:]


def next_token(tokens: list[int]) -> int:
    return chain(tokens)[-1] % 997


def answer_to(prompt: list[int], num_tokens: int) -> list[int]:
    """The answer of an undisturbed run."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class Copy:
    """A piece on its way, with the rows that were read for it. Over TCP the target writes, while it has the epoch.

    With `step`, a step of the source that has not ended computes it.
    """

    command: PushPiece
    step: ScheduleOutput | None = None
    rows: dict[int, list[int]] = field(default_factory=dict)
    is_stopped: bool = False
    is_reported: bool = False


@dataclass
class Faults:
    """Probabilities of what a link does to a piece or a message, and the factor of its time."""

    lose: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    slow: float = 1.0


class World:
    """Workers with a group scheduler; `run` plays until all requests have ended."""

    def __init__(
        self,
        roles: str = "PD",
        *,
        seed: int = 0,
        transport: Transport = "memory",
        num_blocks: int = 40,
        block_sizes: tuple[int, ...] = (),
        policy: LoadFailurePolicy = "recompute",
        faults: Faults | None = None,
        lease_s: float | None = LEASE_S,
        prefix_caching: bool = True,
        chunk: int = 24,
    ) -> None:
        self.now, self.draw, self.transport = 0.0, random.Random(seed), transport
        self.faults = faults or Faults()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        config = PDSchedulerConfig(
            mode="strict",
            max_prefill_tokens=chunk,
            max_prefill_batch_size=4,
            max_decode_batch_size=8,
            enable_prefix_caching=prefix_caching,
        )
        sizes = block_sizes or (4,) * len(roles)
        self.schedulers = [
            PDScheduler(
                config,
                kv_budget=KVBudget(num_blocks * 4 // size, size),
                role="prefill" if role == "P" else "decode",
                clock=lambda: self.now,
            )
            for role, size in zip(roles, sizes, strict=True)
        ]
        # Over TCP pieces are handed out with the step that computes them, over memory after it.
        transfer = TransferConfig(lease_s=lease_s, by_layer=transport == "tcp")
        self.group = DisaggregatedScheduler(self.schedulers, transfer, lambda: self.now, policy=policy)
        self.kv = [self._empty(number) for number in range(len(roles))]
        self.steps: list[list[ScheduleOutput]] = [[] for _ in roles]
        self.tables: dict[int, dict[str, list[int]]] = {}
        self.known: list[dict[str, list[int]]] = [{} for _ in roles]
        self.copies: dict[PieceId, Copy] = {}
        self._live: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.reasons: dict[str, str] = {}
        self.emitted: dict[str, list[int]] = {}
        self.paused: set[int] = set()
        self.last_token_s = 0.0

    def _empty(self, number: int) -> dict[tuple[int, int], list[int]]:
        budget = self.schedulers[number].kv
        num = (budget.max_tokens or 0) // budget.block_size
        return {(block, layer): [EMPTY] * budget.block_size for block in range(num) for layer in range(NUM_LAYERS)}

    # --- requests ---

    def add(self, prompt: list[int], num_tokens: int, name: str | None = None) -> Request:
        request = Request(name or f"r{len(self.requests)}", prompt, max_new_tokens=num_tokens, arrival_time=self.now)
        self.requests[request.request_id] = request
        self._live.append(request)
        self.emitted[request.request_id] = []
        self.group.add_request(request)
        self.pump()
        return request

    def run(self, seconds: float = 600.0) -> None:
        """Plays until no request is live. Fails if that takes longer."""
        self._tick()
        while self._is_live():
            assert self.now < seconds, f"not finished: {self.group.get_stats()}"
            assert self._events, f"nothing happens any more: {self.group.get_stats()}"
            self.step()
        while self._events:  # late messages and the ends of copies
            self.step()

    def _is_live(self) -> bool:
        while self._live and self._live[-1].status is RequestStatus.FINISHED:
            self._live.pop()
        return bool(self._live)

    def _tick(self) -> None:
        """The engine looks at the leases at least this often."""
        self.pump()
        if self._is_live():
            self.at(LEASE_S / 2, self._tick)

    def step(self) -> None:
        """Plays the next event, if there is one."""
        if not self._events:
            return
        self.now, _, action = heapq.heappop(self._events)
        action()
        if self._num_events % CHECK_EVERY == 0:
            self.group.check_integrity()

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + delay, self._num_events, action))

    # --- steps ---

    def pump(self) -> None:
        """Acts on the group's commands, and starts steps where there are none."""
        for command in self.group.dispatch():
            if isinstance(command, PushPiece):
                self._push(command)
            else:
                self._cancel(command)
        for request, reason in self.group.take_unservable():
            self.reasons[request.request_id] = reason
            self.group.abort_request(request.request_id)
        for number, name in self.group.take_moves():
            self.known[number].pop(name, None)
        for member in self.group.members:
            if member.is_up and member.number not in self.paused:
                self._plan(member.number)

    def _plan(self, number: int) -> None:
        scheduler, steps = self.schedulers[number], self.steps[number]
        while len(steps) < 2 and scheduler.can_plan:
            plan = scheduler.plan_ahead()
            self.tables[id(plan)] = self._send_tables(number, plan)
            steps.append(plan)
            for command in self.group.hand_out_planned(number, plan.prefill_batch.chunks if plan.prefill_batch else ()):
                self._push(command, plan)
            epoch = self.group.members[number].epoch
            if len(steps) == 1:
                self._end_later(number, epoch)
            if plan.is_empty:
                break

    def _send_tables(self, number: int, plan: ScheduleOutput) -> dict[str, list[int]]:
        """The block tables that the worker has in this step: it gets only the blocks that it does not have."""
        known = self.known[number]
        for request in (*plan.preempted_requests, *plan.requeued_requests):
            known.pop(request.request_id, None)
        for request in _requests(plan):
            table = known.setdefault(request.request_id, [])
            table += request.kv_block_ids[len(table) :]
        return {request.request_id: list(known[request.request_id]) for request in _requests(plan)}

    def _end_later(self, number: int, epoch: int) -> None:
        self.at(STEP_S * self.draw.uniform(0.5, 1.5), lambda: self._end_step(number, epoch))

    def _end_step(self, number: int, epoch: int) -> None:
        member = self.group.members[number]
        if epoch != member.epoch:
            return  # lost with the worker
        if number in self.paused:
            self.at(STEP_S, lambda: self._end_step(number, epoch))
            return
        plan = self.steps[number].pop(0)
        ended = self._execute(number, plan, self.tables.pop(id(plan)))
        ended += self.schedulers[number].update_after_step(ended, step_id=plan.step_id)
        self.group.ended(ended)
        if self.steps[number]:
            self._end_later(number, epoch)
        self.pump()

    def _execute(self, number: int, plan: ScheduleOutput, tables: dict[str, list[int]]) -> list[str]:
        ended = []
        for batch in (plan.prefill_batch, plan.decode_batch):
            for chunk in batch.chunks if batch is not None else ():
                request = chunk.request
                if request.status is RequestStatus.FINISHED:
                    continue
                tokens = [*request.prompt_token_ids, *request.output_token_ids]
                end = min(chunk.start + chunk.num_tokens, len(tokens))
                found = self._compute(number, tables[request.request_id], tokens, chunk.start, end)
                if chunk.is_last:
                    request.output_token_ids.append(found)
                    self.emitted[request.request_id].append(found)
                    self.last_token_s = self.now
                    if request.num_output_tokens >= request.max_new_tokens:
                        ended.append(request.request_id)
        return ended

    def _compute(self, number: int, table: list[int], tokens: list[int], start: int, end: int) -> int:
        """Reads the KV before `start`, writes that of `start .. end - 1`; a wrong token if any KV read is wrong."""
        size, pool = self.schedulers[number].kv.block_size, self.kv[number]
        expected, is_right = chain(tokens[:end]), True
        for layer in range(NUM_LAYERS):
            blocks = [pool[table[index], layer] for index in range(-(-end // size))]
            for position in range(start, end):
                blocks[position // size][position % size] = expected[position] + layer
            found = [row for block in blocks for row in block][:end]
            is_right &= found == [row + layer for row in expected]
        return expected[-1] % 997 if is_right else 1000

    # --- copies ---

    def _push(self, command: PushPiece, step: ScheduleOutput | None = None) -> None:
        copy = Copy(command, step)
        self.copies[command.id] = copy
        for layer in range(NUM_LAYERS):
            self.at(COPY_S * self.faults.slow * (layer + 1), lambda layer=layer: self._copy_layer(copy, layer))

    def _copy_layer(self, copy: Copy, layer: int) -> None:
        """Reads a layer at the source; writes it to the target at once, or over TCP a little later."""
        command, piece = copy.command, copy.command.piece
        source = self.group.members[command.source]
        if copy.is_stopped or source.epoch != command.epochs[0] or not source.is_up:
            return
        if command.source in self.paused:
            self.at(COPY_S, lambda: self._copy_layer(copy, layer))
            return
        if copy.step is not None and any(copy.step is step for step in self.steps[command.source]):
            self.group.renew(command.id, "source")  # it waits for the step
            self.at(COPY_S * self.faults.slow, lambda: self._copy_layer(copy, layer))
            return
        size = self.schedulers[command.source].kv.block_size
        span = range(piece.start, piece.start + piece.num_tokens)
        pool, first = self.kv[command.source], piece.start // size
        rows = [pool[piece.source_blocks[t // size - first], layer][t % size] for t in span]
        copy.rows[layer] = list(rows)
        self.group.renew(command.id, "source")
        self.group.renew(command.id, "target")
        if self.draw.random() < self.faults.corrupt:
            rows[0] += 1
        if self.transport == "memory":
            self._write(copy, layer, rows)
        elif self.draw.random() >= self.faults.lose:
            self.at(MESSAGE_S, lambda: self._receive(copy, layer, rows))
        if layer == NUM_LAYERS - 1:
            self._message(lambda: self._pushed(copy))

    def _receive(self, copy: Copy, layer: int, rows: list[int]) -> None:
        target = self.group.members[copy.command.target]
        if target.is_up and target.epoch == copy.command.epochs[1] and not copy.is_stopped:
            self._write(copy, layer, rows)

    def _write(self, copy: Copy, layer: int, rows: list[int]) -> None:
        piece, number = copy.command.piece, copy.command.target
        size, pool = self.schedulers[number].kv.block_size, self.kv[number]
        first = piece.start // size
        for position, row in enumerate(rows, piece.start):
            pool[piece.target_blocks[position // size - first], layer][position % size] = row

    def _pushed(self, copy: Copy) -> None:
        """The engine lets the target compare its pool with the digests."""
        self.group.renew(copy.command.id, "source")
        target = self.group.members[copy.command.target]
        if target.is_up and target.epoch == copy.command.epochs[1]:
            self._message(lambda: self._check(copy))

    def _check(self, copy: Copy) -> None:
        command, number = copy.command, copy.command.target
        target = self.group.members[number]
        if not target.is_up or target.epoch != command.epochs[1]:
            return
        if number in self.paused:
            self.at(STEP_S, lambda: self._check(copy))
            return
        piece, size, pool = command.piece, self.schedulers[number].kv.block_size, self.kv[number]
        first, span = piece.start // size, range(piece.start, piece.start + piece.num_tokens)
        found = {
            layer: [pool[piece.target_blocks[t // size - first], layer][t % size] for t in span]
            for layer in range(NUM_LAYERS)
        }
        if found == copy.rows:
            self._answer(copy, lambda: self.group.received(command.id))
        else:
            self._answer(copy, lambda: self.group.stopped(command.id))

    def _cancel(self, command: CancelPiece) -> None:
        def stop(number: int) -> None:
            if number in self.paused and self.group.members[number].is_up:
                self.at(STEP_S, lambda: stop(number))
                return
            left.discard(number)
            if not left:
                if (copy := self.copies.pop(command.id, None)) is not None:
                    copy.is_stopped = True
                self.group.stopped(command.id)
                self.pump()

        left = {*command.workers} or {-1}
        for number in list(left):
            self.at(MESSAGE_S * self.draw.uniform(1, 5), lambda number=number: stop(number))

    def _message(self, action: Callable[[], None]) -> None:
        """A message between engine and worker, which are connected by a reliable stream."""
        self.at(MESSAGE_S * self.draw.uniform(1, 2), action)

    def _answer(self, copy: Copy, action: Callable[[], None]) -> None:
        """An answer that a faulty link may lose, double or delay."""

        def act() -> None:
            action()
            self.pump()

        faults, draw = self.faults, self.draw
        if draw.random() >= faults.lose:
            self.at(MESSAGE_S * (draw.uniform(1, 300) if draw.random() < faults.reorder else 1), act)
        if draw.random() < faults.duplicate:
            self.at(MESSAGE_S * draw.uniform(1, 500), act)

    # --- faults ---

    def kill(self, number: int, restart_s: float = RESTART_S) -> None:
        """A worker dies with its KV and its steps, and starts again."""
        if not self.group.members[number].is_up:
            return
        self.paused.discard(number)
        self.steps[number].clear()
        self.known[number].clear()
        self.kv[number] = self._empty(number) if self.transport == "tcp" else self.kv[number]
        self.group.lose_worker(number)
        self.pump()

        def start() -> None:
            self.group.worker_is_up(number)
            self.pump()

        self.at(restart_s, start)

    def pause(self, number: int, seconds: float, deadline_s: float | None = None) -> None:
        """A worker stops, as by SIGSTOP; after the deadline of a step it is killed."""
        self.paused.add(number)

        def resume() -> None:
            if number in self.paused:
                self.paused.discard(number)
                self.pump()

        self.at(seconds, resume)
        if deadline_s is not None:
            self.at(deadline_s, lambda: self.kill(number) if number in self.paused else None)


def _requests(plan: ScheduleOutput) -> list[Request]:
    return [r for batch in (plan.prefill_batch, plan.decode_batch) if batch is not None for r in batch.requests]
