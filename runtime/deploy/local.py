"""Runs the processes of a deployment on this machine, until one ends or a signal arrives."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from sageLLM.runtime.deploy.launch import Process

POLL_SECONDS = 0.1
STOP_SECONDS = 30.0


class _Stopped(Exception):
    """A signal has arrived."""


def run_processes(processes: Sequence[Process], environment: dict[str, str]) -> int:
    """Runs all processes, and prints their lines with their names. Returns the exit code: 0 after a signal.

    If a process ends, the others are ended, too: a deployment without one of its processes answers no requests.
    """
    previous = {one: signal.signal(one, _stop) for one in (signal.SIGINT, signal.SIGTERM)}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for one in processes:
            running[one.name] = _start(one, environment)
        return _wait(running)
    except _Stopped:
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _end(list(running.values()))


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def _start(one: Process, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "sageLLM.runtime.cli.entry", *one.command[1:]]
    process = subprocess.Popen(
        command, env=environment | dict(one.environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    threading.Thread(target=_copy, args=(one.name, process.stdout), daemon=True).start()
    return process


def _copy(name: str, lines: IO[bytes]) -> None:
    for line in lines:
        print(f"{name}: {line.decode(errors='replace').rstrip()}", flush=True)


def _wait(running: "dict[str, subprocess.Popen[bytes]]") -> int:
    while True:
        for name, process in running.items():
            if (code := process.poll()) is not None:
                print(f"error: {name} has ended with exit code {code}; the others are ended", file=sys.stderr)
                return 1
        time.sleep(POLL_SECONDS)


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Ends all processes; one that does not finish its requests in time is killed."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
