"""Starts worker processes by a fork server, and watches them."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.fork_server import SIZE_LEN, Start, send

ANSWER_SECONDS = 120.0
"""The deadline of an answer of the fork server, which imports torch before the first one."""
FORK_SERVER = "sageLLM.runtime.worker.fork_server"


class WorkerProcess:
    """A worker process that a fork server has started."""

    def __init__(self, pid: int, exit_pipe: int) -> None:
        self.pid = pid
        self._exit_code: int | None = None
        self._exit_pipe = exit_pipe
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, os.close, exit_pipe)

    def poll(self) -> int | None:
        """The exit code, -n after signal n; None while the process runs."""
        return self.wait(0.0)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, or None if the process still runs after so many seconds."""
        with self._lock:
            if self._exit_code is None and select.select([self._exit_pipe], [], [], seconds)[0]:
                code = os.read(self._exit_pipe, SIZE_LEN)
                # Without a code the server has been killed, and the worker ends as its parent has.
                self._exit_code = int.from_bytes(code, "big", signed=True) if code else -signal.SIGKILL
            return self._exit_code

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class ForkServerClient:
    """Starts a fork server with the first worker, and again if it has ended.

    The server ends when this process ends. It is not shared with a process that this one forks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._owner = 0

    @property
    def process_id(self) -> int | None:
        """The operating system's id of the server; None before the first worker."""
        return None if self._server is None else self._server.pid

    def start(self, spec: WorkerSpec, module: str, connection: int, environment: Mapping[str, str]) -> WorkerProcess:
        """Starts a worker that calls `run` of the module. Raises EngineError if no process can be started."""
        encoded = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
        start = Start(module, spec, encoded, str(Path.cwd()), list(sys.path), _cores())
        files = [1, 2, connection, *spec.files]
        with self._lock:
            for _ in range(2):
                try:
                    return self._start(start, files)
                except (ConnectionError, TimeoutError, EOFError):  # the server has ended, or does not answer
                    self._forget_server()
                except OSError as error:  # of this process, or of the system: workers that run must not end for it
                    raise EngineError(f"a worker process cannot be started: {error.strerror}") from None
        raise EngineError("the process that starts workers has ended or does not answer; its errors are above")

    def _forget_server(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def _start(self, start: Start, files: Sequence[int]) -> WorkerProcess:
        if self._owner != os.getpid():  # the server is that of a process that has forked this one
            self._owner, self._server, self._requests = os.getpid(), None, None
        if self._requests is None:
            self._server, self._requests = start_server()
        exit_pipe, write_end = os.pipe()
        try:
            send(self._requests, start, [write_end, *files])
            if len(reply := self._requests.recv(SIZE_LEN, socket.MSG_WAITALL)) < SIZE_LEN:
                raise EOFError
            if (answer := int.from_bytes(reply, "big", signed=True)) < 0:
                raise OSError(-answer, os.strerror(-answer))
        except (OSError, EOFError):
            os.close(exit_pipe)
            raise
        finally:
            os.close(write_end)
        return WorkerProcess(answer, exit_pipe)


WORKERS = ForkServerClient()
"""The fork server of this process."""


def start_server() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a fork server, which answers requests on the socket when it is ready."""
    ours, theirs = socket.socketpair()
    ours.settimeout(ANSWER_SECONDS)  # a stopped server counts as one that has ended
    with theirs:
        search_path = os.pathsep.join(path for path in sys.path if path)
        # OpenBLAS, which numpy loads, must not start threads.
        environment = os.environ | {"PYTHONPATH": search_path, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", FORK_SERVER, str(theirs.fileno())]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment)
    return server, ours


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
