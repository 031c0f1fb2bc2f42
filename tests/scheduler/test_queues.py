"""The ranked queue: order, lazy deletion, and its size."""

import math
import random

from sageLLM.runtime.scheduler.queues import RankedQueue, WaitingQueue
from sageLLM.runtime.scheduler.request import Request


def request(name: str, rank: tuple[float, int]) -> Request:
    one = Request(name, [1])
    one.rank = rank
    return one


def test_a_random_mix_of_operations_agrees_with_a_sorted_list() -> None:
    rng = random.Random(3)
    queue: RankedQueue[Request] = RankedQueue()
    members: list[Request] = []
    for number in range(2000):
        if not members or rng.random() < 0.55:
            one = request(f"r{rng.randrange(10**9)}", (rng.randrange(5), number))
            queue.push(one)
            members.append(one)
        else:
            queue.remove(members.pop(rng.randrange(len(members))))
        first = min(members, key=lambda one: one.rank, default=None)
        assert queue.peek() is first
        assert len(queue) == len(members)
    assert list(queue) == sorted(members, key=lambda one: one.rank)


def test_removed_members_leave_the_heap() -> None:
    queue: RankedQueue[Request] = RankedQueue()
    queue.push(request("first", (0, 0)))
    for number in range(1, 1000):
        one = request(str(number), (1, number))
        queue.push(one)
        queue.remove(one)
        assert len(queue._heap) <= 2 * len(queue) + 17


def test_a_member_can_return_with_another_rank() -> None:
    queue: RankedQueue[Request] = RankedQueue()
    one, other = request("a", (1, 0)), request("b", (2, 1))
    queue.push(one)
    queue.push(other)
    queue.remove(one)
    one.rank = (3, 0)
    queue.push(one)
    assert [member.request_id for member in queue] == ["b", "a"]
    assert queue.peek() is other


def waiting(name: str, rank: float, age: int) -> Request:
    one = request(name, (rank, age))
    one.sequence_number = age
    return one


def test_overtakes_are_counted_anew_when_the_oldest_is_admitted() -> None:
    queue = WaitingQueue(max_overtakes=3)
    old = [waiting("old0", 1, 0), waiting("old1", 9, 1)]
    for one in (*old, *(waiting(str(i), 0, i) for i in range(2, 7))):
        queue.push(one)
    for _ in range(2):
        queue.admit(queue.peek())
    queue.admit(old[0])  # the oldest one itself
    for _ in range(2):
        queue.admit(queue.peek())
        assert queue.peek() is not old[1]
    queue.admit(queue.peek())
    assert queue.peek() is old[1]


def test_a_promoted_request_stays_at_the_head() -> None:
    queue = WaitingQueue(max_overtakes=1)
    oldest, other = waiting("oldest", 9, 0), waiting("other", 0, 1)
    queue.push(oldest)
    queue.push(other)
    queue.admit(other)
    assert oldest.rank == (-math.inf, 0)
    queue.move(oldest, (7, 0))
    queue.push(waiting("late", 1, 2))
    assert queue.peek() is oldest
