"""Prefill and decode workers with a scheduler each: answers, placement, backpressure, roles and read-back."""

from __future__ import annotations

import random

import pytest
from disaggregated_world import World, answer_to

from sageLLM.runtime.scheduler.request import Request


def play(world: World, num_requests: int, seed: int = 0, longest: int = 60) -> None:
    draw = random.Random(seed)
    for _ in range(num_requests):
        prompt = [draw.randrange(50) for _ in range(draw.randrange(1, longest))]
        world.add(prompt, draw.randrange(1, 20))
        if draw.random() < 0.5:
            for _ in range(draw.randrange(6)):
                world.step()
    world.run()
    assert_right(world)


def assert_right(world: World) -> None:
    """Every answer is that of an undisturbed run, no token was emitted twice, and all blocks are free again."""
    for request in world.requests.values():
        expected = answer_to(request.prompt_token_ids, request.max_new_tokens)
        assert world.emitted[request.request_id] == expected, request.request_id
    assert_free(world)


def assert_free(world: World) -> None:
    world.group.check_integrity()
    for scheduler in world.schedulers:
        assert scheduler.kv.decode.pool.num_used == 0


@pytest.mark.parametrize("roles", ["PD", "PPD", "PDD", "PPPDD"])
@pytest.mark.parametrize("seed", range(2))
def test_answers_are_those_of_one_worker(roles: str, seed: int) -> None:
    play(World(roles, seed=seed), 30, seed)


def test_blocks_of_different_sizes() -> None:
    play(World("PPDD", block_sizes=(4, 8, 16, 2)), 30)


def test_a_full_decode_worker_sends_its_victims_back() -> None:
    num_preemptions = 0
    for seed in range(6):
        world = World("PD", num_blocks=22, seed=seed, prefix_caching=False)
        play(world, 20, seed, longest=40)
        num_preemptions += world.group.get_stats()["total_preemptions"]
    assert num_preemptions > 0


def test_long_random_loads() -> None:
    for seed in range(3):
        roles = ["PD", "PPDD", "PDD"][seed % 3]
        play(World(roles, seed=seed, num_blocks=30, transport="tcp" if seed % 2 else "memory"), 25, seed)


def test_hits_of_the_decode_worker_are_not_sent() -> None:
    world = World("PD")
    prompt = list(range(40))
    for _ in range(2):
        world.add(prompt, 5)
        world.run()
    assert_right(world)
    stats = world.group.get_stats()
    assert stats["total_sent_tokens"] == 40 + 4
    assert stats["total_present_tokens"] == 36


def test_a_new_turn_reads_back_the_answer_before() -> None:
    world = World("PD", num_blocks=100)
    first = world.add(list(range(40)), 70)
    world.run()
    sent = world.group.get_stats()["total_sent_tokens"]
    second = world.add([*first.prompt_token_ids, *first.output_token_ids, 7, 8, 9], 5)
    world.run()
    assert_right(world)
    stats = world.group.get_stats()
    assert stats["total_read_back"] == 1
    # 108 of 113 tokens were on the decode worker, 40 of them on the prefill worker too: 68 go back, and 5 forth.
    assert stats["total_sent_tokens"] - sent == 68 + 5
    assert stats["total_cached_tokens"] == 108 and second.num_computed_tokens >= 108


def test_requests_go_where_their_prefix_is() -> None:
    world = World("PPDD", num_blocks=200)
    for turn in range(3):
        for user in range(4):
            world.add([100 + user] * 60 + list(range(turn)), 4)
            world.run()
    stats = world.group.get_stats()
    assert stats["total_cached_tokens"] == 2 * 4 * 60  # every later turn
    assert stats["total_present_tokens"] == 2 * 4 * 60


def test_requests_are_divided_by_load() -> None:
    world = World("PPDD", num_blocks=200)
    for index in range(16):
        world.add([index] * 40, 30)
    while world.group.get_stats()["total_handed_over"] < 14:
        world.step()
    used = [status.num_blocks_used for status in world.group.workers()]
    assert abs(used[2] - used[3]) <= 24
    world.run()
    assert_right(world)


def test_prefill_waits_for_room_to_decode() -> None:
    """The prompts that no decode worker has room for stay on the prefill worker, which fills up and admits no more."""
    world = World("PD", num_blocks=20, prefix_caching=False)
    for index in range(8):
        world.add([index] * 30, 20)
    most = 0
    while any(request.num_output_tokens < 20 for request in world.requests.values()):
        world.step()
        most = max(most, world.schedulers[1].kv.decode.pool.num_used)
    assert 0 < most <= 20
    world.run()
    assert_right(world)


def test_a_request_ends_in_every_state() -> None:
    for num_steps in range(0, 60, 3):
        world = World("PD", seed=num_steps)
        request = world.add(list(range(60)), 10)
        other = world.add(list(range(30, 60)), 10)
        for _ in range(num_steps):
            world.step()
        world.group.abort_request(request.request_id)
        world.run()
        assert world.emitted[other.request_id] == answer_to(other.prompt_token_ids, 10)
        assert_free(world)


def test_a_worker_changes_its_role_without_losing_a_request() -> None:
    for seed in range(2):
        world = World("PPDD", seed=seed)
        draw = random.Random(seed)
        for index in range(30):
            world.add([draw.randrange(9) for _ in range(draw.randrange(1, 50))], draw.randrange(1, 25))
            for _ in range(draw.randrange(20)):
                world.step()
            if index == 10:
                world.group.set_role(1, "decode")
            if index == 20:
                world.group.set_role(3, "prefill")
        world.run()
        assert_right(world)
        assert [status.role for status in world.group.workers()] == ["prefill", "decode", "decode", "prefill"]


def test_the_last_worker_of_a_role_keeps_it() -> None:
    world = World("PD")
    with pytest.raises(ValueError, match="worker 0 must keep its role: it is the only prefill worker"):
        world.group.set_role(0, "decode")


def test_an_unknown_and_a_doubled_request_are_refused() -> None:
    world = World("PD")
    world.add([1, 2], 3, "a")
    with pytest.raises(ValueError, match="'a' is already being served"):
        world.group.add_request(Request("a", [1]))
    assert not world.group.abort_request("b")
