"""A slow link between workers under virtual time: what goes on keeps its leases, and nothing is sent twice.

The real `TransferDesk` controls simulated ranks, which send pieces one after another at a rate of tokens per second.
"""

from __future__ import annotations

from typing import Any

import pytest
from disaggregated_world import LEASE_S, NUM_LAYERS, World, answer_to

from sageLLM.runtime.engine.transfer_desk import TransferDesk
from sageLLM.runtime.scheduler.batch import ScheduleOutput
from sageLLM.runtime.scheduler.transfer_commands import CancelPiece, PushPiece
from sageLLM.runtime.transport.base import Report
from sageLLM.runtime.transport.handle import Handle, PieceKey, open_handle
from sageLLM.runtime.worker.kv_group import CancelKV, CheckKV, KVCommand, KVGroup, MemberSpec, PushKV

KEY = b"k" * 32
LOOK_S = 0.1
"""The interval between two reports of progress."""


class Rank:
    """The only rank of a worker: copies the pieces that it gets in their order, while its link has a rate."""

    def __init__(self, world: SlowWorld, number: int) -> None:
        self.world, self.number, self.addresses = world, number, list[str]()
        self.queue: list[tuple[Handle, float]] = []
        self.kills: list[str] = []

    def send(self, command: KVCommand) -> None:
        if isinstance(command, PushKV):
            handle = open_handle(command.handle, KEY)
            self.queue.append((handle, float(handle.num_tokens)))
            if len(self.queue) == 1:
                self.world.at(LOOK_S, self.go_on)
        elif isinstance(command, CheckKV):
            handle = open_handle(command.handle, KEY)
            is_right = self.world.digest(self.number, handle) == command.digests[0][0]
            self.report("received" if is_right else "failed", handle.key)
        elif isinstance(command, CancelKV):
            self.queue = [one for one in self.queue if one[0].key != command.key]
            self.report("stopped", command.key)

    def go_on(self) -> None:
        """What passes the link in an interval."""
        budget = self.world.rate * LOOK_S
        if budget:
            for handle, _ in self.queue:
                self.report("alive", handle.key)
        while budget and self.queue:
            handle, left = self.queue[0]
            self.queue[0], budget = (handle, left - min(left, budget)), budget - min(left, budget)
            if self.queue[0][1]:
                break
            self.queue.pop(0)
            self.world.copy(handle)
            self.report("pushed", handle.key, {0: self.world.digest(self.number, handle)})
        if self.queue:
            self.world.at(LOOK_S, self.go_on)

    def report(self, kind: Any, key: PieceKey, digests: dict[int, int] | None = None) -> None:
        def arrive() -> None:
            self.world.desk.take(self.number, Report(kind, key, 0, digests or {}))
            self.world.pump()

        self.world.at(0.001, arrive)

    def kill(self, reason: str) -> None:
        self.kills.append(reason)


class SlowWorld(World):
    """A world with copies by the desk, over links of so many tokens per second."""

    def __init__(self, roles: str, rate: float) -> None:
        self.rate = rate
        super().__init__(roles, num_blocks=2000, prefix_caching=False)
        self.ranks = [Rank(self, number) for number in range(len(roles))]
        members = [MemberSpec(1, 2000, 4) for _ in roles]
        group = KVGroup(0, 0, "tcp", KEY, NUM_LAYERS, 1, (1, 1), members, "crc32")
        self.desk = TransferDesk(group, self.ranks, self.group, lambda: self.now, LEASE_S)

    def pump(self) -> None:
        super().pump()
        self.desk.kill_silent()
        self.desk.forget_arrived(self.group.is_in_flight)

    def _push(self, command: PushPiece, step: ScheduleOutput | None = None) -> None:
        self.desk.push(command)

    def _cancel(self, command: CancelPiece) -> None:
        self.desk.cancel(command)

    def _rows(self, number: int, blocks: list[int], handle: Handle) -> list[tuple[list[int], int]]:
        size = self.schedulers[number].kv.block_size
        span = range(handle.start, handle.start + handle.num_tokens)
        places = [(blocks[t // size - handle.start // size], t % size) for t in span]
        return [(self.kv[number][block, layer], at) for layer in range(NUM_LAYERS) for block, at in places]

    def copy(self, handle: Handle) -> None:
        source = self._rows(handle.source.worker, handle.source.blocks, handle)
        target = self._rows(handle.target.worker, handle.target.blocks, handle)
        for (rows, at), (written, place) in zip(source, target, strict=True):
            written[place] = rows[at]

    def digest(self, number: int, handle: Handle) -> int:
        end = handle.source if number == handle.source.worker else handle.target
        return hash(tuple(rows[at] for rows, at in self._rows(number, end.blocks, handle)))


def play(roles: str, rate: float, num_requests: int, num_tokens: int = 3) -> SlowWorld:
    world = SlowWorld(roles, rate)
    for index in range(num_requests):
        world.add([index] * 50, num_tokens)
    return world


def assert_answers(world: SlowWorld) -> None:
    for request in world.requests.values():
        assert world.emitted[request.request_id] == answer_to(request.prompt_token_ids, request.max_new_tokens)
    world.group.check_integrity()
    assert not any(rank.kills for rank in world.ranks)
    assert all(scheduler.kv.decode.pool.num_used == 0 for scheduler in world.schedulers)


@pytest.mark.parametrize("roles", ["PD", "PPDD"])
def test_a_queue_that_is_longer_than_the_lease_is_sent_once(roles: str) -> None:
    world = play(roles, 40.0, 16)  # 50 tokens take 1.25 s, and a lease is 0.5 s
    world.run()
    stats, num_sources = world.group.get_stats(), roles.count("P")
    assert (stats["total_failed"], stats["total_recomputed_tokens"]) == (0, 0)
    assert stats["total_sent_tokens"] == 16 * 50
    assert world.last_token_s < 1.05 * 16 * 50 / 40.0 / num_sources + 1.0
    assert_answers(world)


def test_a_link_that_stops_costs_one_attempt() -> None:
    world = play("PD", 400.0, 6)
    while world.group.get_stats()["total_handed_over"] < 2:
        world.step()
    waiting = sum(transfer.num_handed_out - transfer.num_arrived for transfer in world.group.transfers.values())
    world.rate = 0.0
    world.at(1.5 * LEASE_S, lambda: setattr(world, "rate", 400.0))
    world.run()
    stats = world.group.get_stats()
    assert waiting and 0 < stats["total_failed"] <= 4
    assert stats["total_sent_tokens"] <= 6 * 50 + waiting
    assert stats["total_recomputed_tokens"] == 0
    assert_answers(world)


def test_a_link_that_stops_for_ever_ends_the_requests() -> None:
    world = play("PD", 0.0, 3, num_tokens=8)  # each prefill samples one token
    world.run()
    assert set(world.reasons) == {"r0", "r1", "r2"}
    assert world.now < 3 * 4 * (2 * LEASE_S) + 2.0, "three attempts for the first prefill, and each recomputation"
    assert not any(rank.kills for rank in world.ranks)
