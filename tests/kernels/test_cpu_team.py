"""The threads that kernels share: every part is computed once, whoever asks, from wherever."""

import ctypes
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.team import load_team

COMPILER = find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


@pytest.fixture(params=[1, 2, 4])
def team(request) -> Iterator[ctypes.CDLL]:
    library = load_team(COMPILER)
    library.sage_use_threads(ctypes.c_int64(request.param))
    library.sage_num_threads.restype = ctypes.c_int64
    yield library
    library.sage_use_threads(ctypes.c_int64(1))


def share(team: ctypes.CDLL, parts: int, compute) -> None:
    team.sage_share(ctypes.c_int64(parts), Body(lambda _, part: compute(part)), None)


@pytest.mark.parametrize("parts", [0, 1, 2, 7, 100])
def test_every_part_is_computed_once(team, parts) -> None:
    for _ in range(20):
        seen: list[int] = []
        share(team, parts, seen.append)
        assert sorted(seen) == list(range(parts))


def test_parts_that_take_long_are_waited_for(team) -> None:
    """Longer than the threads watch, so that they and the caller sleep."""
    for seconds in (0.02, 0.0, 0.01):
        seen: list[int] = []
        share(team, 5, lambda part, wait=seconds, seen=seen: (time.sleep(wait), seen.append(part)))
        assert sorted(seen) == list(range(5))
        time.sleep(0.005)


def test_threads_take_parts_beside_the_caller(team) -> None:
    who: set[int] = set()
    num_threads, deadline = team.sage_num_threads(), time.monotonic() + 10

    def wait_for_company(_: int) -> None:
        who.add(threading.get_native_id())
        while len(who) < num_threads and time.monotonic() < deadline:
            time.sleep(0.001)

    share(team, num_threads, wait_for_company)
    assert len(who) == num_threads


def test_what_a_part_shares_out_it_computes_itself(team) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    strangers: list[int] = []

    def outer(part: int) -> None:
        own = threading.get_native_id()
        assert team.sage_num_threads() == 1

        def inner(piece: int) -> None:
            seen[part, piece] += 1
            if threading.get_native_id() != own:
                strangers.append(piece)

        share(team, 3, inner)

    share(team, 4, outer)
    assert seen == {(part, piece): 1 for part in range(4) for piece in range(3)}
    assert not strangers


def test_two_callers_at_once_both_get_all_their_parts(team) -> None:
    seen: list[Counter[int]] = [Counter(), Counter()]

    def call(own: Counter[int]) -> None:
        for _ in range(50):
            share(team, 6, lambda part: own.update([part]))

    callers = [threading.Thread(target=call, args=(own,)) for own in seen]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert seen == [Counter(dict.fromkeys(range(6), 50))] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(team) -> None:
    share(team, 4, lambda part: None)
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        share(team, 9, seen.append)
        os._exit(0 if sorted(seen) == list(range(9)) else 1)
    for _ in range(500):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0
