"""After every test: no worker process without an engine that uses it, and no shared memory with a name."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

MARK = f"SAGELLM_TEST_RUN={os.getpid()}"
WORKER = b"sageLLM.runtime.worker.fork_server"
SECONDS = 10.0


@pytest.fixture(scope="session", autouse=True)
def mark_processes() -> None:
    """Processes of this run inherit the variable."""
    name, value = MARK.split("=")
    os.environ[name] = value


@pytest.fixture(autouse=True)
def no_orphans(mark_processes: None) -> Iterator[None]:
    yield
    deadline = time.monotonic() + SECONDS
    while left := _workers() - _used():
        assert time.monotonic() < deadline, f"worker processes {sorted(left)} are left"
        time.sleep(0.05)
    memory = Path("/dev/shm")
    assert not (memory.exists() and list(memory.glob("*sagellm*"))), "shared memory is left"


def _workers() -> set[int]:
    """The worker processes of this run, without the fork server of this process."""
    from sageLLM.runtime.worker.worker_process import WORKERS

    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_worker = WORKER in (folder / "cmdline").read_bytes()
            if is_worker and MARK.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found - {WORKERS.process_id}


def _used() -> set[int]:
    """The worker processes of the engines in this process."""
    from sageLLM.runtime.worker.ffn_workers import FfnWorkers
    from sageLLM.runtime.worker.process_executor import ProcessExecutor

    gc.collect()
    # By type: isinstance reads __class__, which some objects of torch compute.
    owners = [one for one in gc.get_objects() if type(one) is ProcessExecutor or type(one) is FfnWorkers]
    return {process_id for owner in owners for process_id in owner.process_ids}
