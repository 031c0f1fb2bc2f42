"""The thread pool of the kernels: every part is computed exactly once, by any caller, nested or concurrent."""

import ctypes
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.thread_pool import load_thread_pool

COMPILER = find_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


@pytest.fixture(params=[1, 2, 4])
def pool(request) -> Iterator[ctypes.CDLL]:
    library = load_thread_pool(COMPILER)
    library.sage_set_num_threads(ctypes.c_int64(request.param))
    library.sage_num_threads.restype = ctypes.c_int64
    yield library
    library.sage_set_num_threads(ctypes.c_int64(1))


def parallel_for(pool: ctypes.CDLL, parts: int, compute) -> None:
    pool.sage_parallel_for(ctypes.c_int64(parts), Body(lambda _, part: compute(part)), None)


@pytest.mark.parametrize("parts", [0, 1, 2, 7, 100])
def test_every_part_is_computed_once(pool, parts) -> None:
    for _ in range(20):
        computed: list[int] = []
        parallel_for(pool, parts, computed.append)
        assert sorted(computed) == list(range(parts))


def test_the_caller_waits_for_long_parts(pool) -> None:
    """Longer than the threads spin, so that they and the caller sleep."""
    for seconds in (0.02, 0.0, 0.01):
        computed: list[int] = []
        parallel_for(pool, 5, lambda part, wait=seconds, computed=computed: (time.sleep(wait), computed.append(part)))
        assert sorted(computed) == list(range(5))
        time.sleep(0.005)


def test_all_threads_take_parts(pool) -> None:
    threads: set[int] = set()
    num_threads, deadline = pool.sage_num_threads(), time.monotonic() + 10

    def wait_for_the_others(_: int) -> None:
        threads.add(threading.get_native_id())
        while len(threads) < num_threads and time.monotonic() < deadline:
            time.sleep(0.001)

    parallel_for(pool, num_threads, wait_for_the_others)
    assert len(threads) == num_threads


def test_a_nested_loop_runs_on_its_own_thread(pool) -> None:
    computed: Counter[tuple[int, int]] = Counter()
    on_other_threads: list[int] = []

    def outer(part: int) -> None:
        thread = threading.get_native_id()
        assert pool.sage_num_threads() == 1

        def inner(piece: int) -> None:
            computed[part, piece] += 1
            if threading.get_native_id() != thread:
                on_other_threads.append(piece)

        parallel_for(pool, 3, inner)

    parallel_for(pool, 4, outer)
    assert computed == {(part, piece): 1 for part in range(4) for piece in range(3)}
    assert not on_other_threads


def test_concurrent_callers_get_all_their_parts(pool) -> None:
    computed: list[Counter[int]] = [Counter(), Counter()]

    def call(own: Counter[int]) -> None:
        for _ in range(50):
            parallel_for(pool, 6, lambda part: own.update([part]))

    callers = [threading.Thread(target=call, args=(own,)) for own in computed]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert computed == [Counter(dict.fromkeys(range(6), 50))] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not support fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_its_own_threads(pool) -> None:
    parallel_for(pool, 4, lambda part: None)
    child = os.fork()
    if child == 0:
        computed: list[int] = []
        parallel_for(pool, 9, computed.append)
        os._exit(0 if sorted(computed) == list(range(9)) else 1)
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
