"""Faults x states x transports of disaggregated requests, with the real schedulers and state machines.

Each case waits until a request is in a state, and applies a fault. Afterwards the answers of all requests are those of
an undisturbed run, or with the policy "fail" end with a reason; all blocks are free; and it took less than `SECONDS`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from disaggregated_world import LEASE_S, RESTART_S, Faults, Transport, World, answer_to

from sageLLM.runtime.scheduler.transfer import TransferState

SECONDS = 3 * RESTART_S + 8 * LEASE_S + 4.0
"""Virtual time from the fault to the end of all requests; without a fault they take two seconds."""
PROMPT = list(range(100))


def once(change: Callable[[World], None], seconds: float = 1.0) -> Callable[[World], None]:
    """A fault of the links that ends after some time."""

    def apply(world: World) -> None:
        change(world)
        world.at(seconds, lambda: setattr(world, "faults", Faults()))

    return apply


def links(**faults: float) -> Callable[[World], None]:
    return once(lambda world: setattr(world, "faults", Faults(**faults)))


def kill(*roles: str, restart_s: float = RESTART_S) -> Callable[[World], None]:
    def apply(world: World) -> None:
        for member in world.group.members:
            if member.role in roles:
                world.kill(member.number, restart_s)

    return apply


def pause(role: str, seconds: float, deadline_s: float | None) -> Callable[[World], None]:
    def apply(world: World) -> None:
        number = next(member.number for member in world.group.members if member.role == role)
        world.pause(number, seconds, deadline_s)

    return apply


FAULTS: dict[str, Callable[[World], None]] = {
    "prefill worker dies": kill("prefill"),
    "decode worker dies": kill("decode"),
    "both die": kill("prefill", "decode"),
    "prefill worker restarts at once": kill("prefill", restart_s=0.002),
    "decode worker restarts at once": kill("decode", restart_s=0.002),
    "prefill worker hangs": pause("prefill", 60.0, 1.0),
    "decode worker hangs": pause("decode", 60.0, 1.0),
    "prefill worker stops for a while": pause("prefill", 0.8, None),
    "decode worker stops for a while": pause("decode", 0.8, None),
    "link drops": links(lose=1.0),
    "link loses": links(lose=0.4),
    "slow link": links(slow=80.0),
    "messages doubled": links(duplicate=1.0),
    "messages reordered": links(reorder=1.0),
    "pages corrupted": links(corrupt=0.2),
    "everything": links(lose=0.2, duplicate=0.3, reorder=0.3, corrupt=0.1, slow=3.0),
}


def has_state(state: str) -> Callable[[World], bool]:
    def holds(world: World) -> bool:
        group = world.group
        found = group.transfer_state("target")
        transfer = group.transfers.get("target")
        if state == "sending":
            return transfer is not None and bool(transfer.in_flight)
        if state == "some received":
            return transfer is not None and transfer.num_arrived > transfer.num_present
        if state == "prefilled":
            return found is TransferState.SENDING
        return found is not None and found.value == state

    return holds


STATES = ["queued", "prefilling", "sending", "some received", "prefilled", "decoding"]


def start(roles: str, transport: Transport, seed: int, **options: object) -> World:
    world = World(roles, transport=transport, seed=seed, num_blocks=120, **options)  # type: ignore[arg-type]
    for index in range(3):
        world.add([200 + index] * 70, 15)
    world.add(PROMPT, 15, "target")
    return world


def until(world: World, state: str) -> None:
    holds = has_state(state)
    while not holds(world):
        world.step()


@pytest.mark.parametrize("transport", ["memory", "tcp"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_changes_no_answer(fault: str, state: str, transport: Transport) -> None:
    seed = list(FAULTS).index(fault) + STATES.index(state)
    world = start("PPDD" if (seed + (transport == "tcp")) % 2 else "PD", transport, seed)
    until(world, state)
    begin = world.now
    FAULTS[fault](world)
    world.run()
    assert world.last_token_s - begin < SECONDS
    assert_right(world)


@pytest.mark.parametrize("transport", ["memory", "tcp"])
def test_with_the_policy_fail_requests_end_with_a_reason(transport: Transport) -> None:
    world = start("PD", transport, 0, policy="fail")
    until(world, "prefilling")
    world.faults = Faults(corrupt=1.0)
    world.run()
    reason = "its KV could not be transferred to a decode worker"
    assert world.reasons["target"] == reason
    assert len(world.emitted["target"]) == 1
    assert_free(world)


def test_a_request_that_is_never_transferred_ends_after_some_recomputations() -> None:
    world = World("PD", faults=Faults(corrupt=1.0))
    world.add([1] * 30, 10)
    world.run()
    assert world.reasons == {"r0": "its KV could not be transferred to a decode worker"}
    assert_free(world)


def test_leases_are_renewed_under_load() -> None:
    """128 transfers over a slow link: each takes longer than a lease, and none expires as both ends renew it."""
    world = World("PD", num_blocks=2000, faults=Faults(slow=30.0), lease_s=0.7, chunk=200)
    for index in range(24):
        world.add([index] * 50, 3)
    world.run()
    stats = world.group.get_stats()
    assert stats["total_failed"] == 0 and stats["total_pieces"] >= 24
    assert_free(world)


def test_random_faults() -> None:
    """`benchmarks/chaos.py --simulated` plays any number of transfers."""
    for seed in range(8):
        draw = random.Random(seed)
        world = World(draw.choice(["PD", "PPDD", "PPD"]), seed=seed, transport=draw.choice(["memory", "tcp"]))
        for _ in range(25):
            world.add([draw.randrange(20) for _ in range(draw.randrange(1, 60))], draw.randrange(1, 15))
            for _ in range(draw.randrange(12)):
                world.step()
            FAULTS[draw.choice(list(FAULTS))](world)
        world.run()
        assert_right(world)


def assert_right(world: World) -> None:
    """Answers are those of an undisturbed run, or the beginning of one with a reason for its end."""
    for request in world.requests.values():
        expected, found = answer_to(request.prompt_token_ids, request.max_new_tokens), world.emitted[request.request_id]
        assert found == (expected[: len(found)] if request.request_id in world.reasons else expected)
    assert_free(world)


def assert_free(world: World) -> None:
    world.group.check_integrity()
    for scheduler in world.schedulers:
        assert scheduler.kv.decode.pool.num_used == 0
