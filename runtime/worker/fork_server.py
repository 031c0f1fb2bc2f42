"""A process that has imported the modules of workers, and forks a worker for each request.

    python -m sageLLM.runtime.worker.fork_server FD

Importing torch takes seconds of computation, forking a few milliseconds, and the workers share the memory of the
modules. Requests arrive on an inherited socket without an address. The process has one thread, so no lock is held when
it forks. It ends with the process that has started it, and its workers end then, too.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from sageLLM.runtime.worker.build import WorkerSpec

MODULES = ("sageLLM.runtime.worker.process", "sageLLM.runtime.worker.ffn_process")
PARENT_CHECK_SECONDS = 0.5
MAX_FILES = 253  # of a message in Linux
SIZE_LEN = 8


class Start(msgspec.Struct, frozen=True):
    """Fork a worker that calls `run(spec, connection, server)` of the module, in the state of the engine's process.

    Descriptors come with the message: the pipe for the exit code, standard output and errors, the connection to the
    engine, and those of the spec.
    """

    module: str
    spec: WorkerSpec
    environment: dict[bytes, bytes]
    folder: str
    path: list[str]
    cores: list[int]


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a worker's collector would write to, and so copy, the pages of the modules
    ForkServer(socket.socket(fileno=int(sys.argv[1]))).run()


class ForkServer:
    """Forks workers, and writes their exit codes to their pipes."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._exit_pipes: dict[int, int] = {}
        self._ended, self._wake = socket.socketpair()
        for end in (self._ended, self._wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # Ctrl-C in a terminal reaches the engine, too, which ends this process.
        self._on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serves requests until the parent has ended."""
        parent = os.getppid()
        while os.getppid() == parent:
            ready, _, _ = select.select([self._requests, self._ended], [], [], PARENT_CHECK_SECONDS)
            if self._ended in ready:
                self._ended.recv(4096)
                self._report_ended()
            if self._requests in ready and not self.serve():
                return

    def serve(self) -> bool:
        """Answers a request with the id of the worker, or with minus the error number; returns False at the end."""
        data, files = _receive(self._requests)
        if not data:
            return False
        try:
            answer = self._fork(msgspec.msgpack.decode(data, type=Start), files)
        except OSError as error:  # the system has no process left: those that run must not end with this one
            os.close(files[0])
            answer = -(error.errno or errno.EAGAIN)
        for file in files[1:]:
            os.close(file)
        self._requests.sendall(answer.to_bytes(SIZE_LEN, "big", signed=True))
        return True

    def _fork(self, start: Start, files: Sequence[int]) -> int:
        server = os.getpid()
        process_id = os.fork()
        if process_id == 0:
            self._become_worker(start, files, server)
        self._exit_pipes[process_id] = files[0]
        return process_id

    def _report_ended(self) -> None:
        while self._exit_pipes:
            process_id, status = os.waitpid(-1, os.WNOHANG)
            if process_id == 0:
                return
            pipe = self._exit_pipes.pop(process_id)
            with suppress(BrokenPipeError):  # the engine does not ask any more
                os.write(pipe, os.waitstatus_to_exitcode(status).to_bytes(SIZE_LEN, "big", signed=True))
            os.close(pipe)

    def _become_worker(self, start: Start, files: Sequence[int], server: int) -> NoReturn:
        code = 1
        try:
            self._drop_state()
            _run_worker(start, files, server)
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _drop_state(self) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, self._on_interrupt)
        for end in (self._requests, self._ended, self._wake):
            end.close()
        for pipe in self._exit_pipes.values():
            os.close(pipe)


def _run_worker(start: Start, files: Sequence[int], server: int) -> None:
    exit_pipe, output, errors, connection, *own = files
    os.close(exit_pipe)
    for number, file in ((1, output), (2, errors)):
        os.dup2(file, number)
        os.close(file)
    _take_over(start)
    _name_process(start.spec)
    importlib.import_module(start.module).run(start.spec.with_files(own), connection, server)


def _take_over(start: Start) -> None:
    """Makes the process what it would be if the engine's process had started it."""
    os.environb.clear()
    os.environb.update(start.environment)
    os.chdir(start.folder)
    sys.path[:] = start.path
    if start.cores:
        os.sched_setaffinity(0, start.cores)
    # OpenMP has read the variable when torch was imported, perhaps with another value.
    if (num_threads := os.environ.get("OMP_NUM_THREADS", "").split(",")[0]).isdecimal():
        torch.set_num_threads(max(1, int(num_threads)))


def _name_process(spec: WorkerSpec) -> None:
    """Sets the name that `ps -o comm` and `top` show; the command is that of the server."""
    role = "rank" if spec.side is None or spec.side.role == "attention" else "ffn"
    with suppress(OSError):
        Path("/proc/self/comm").write_text(f"sagellm-{role}{spec.rank}")


def _receive(requests: socket.socket) -> tuple[bytes, list[int]]:
    """A message, empty at the end, with its descriptors."""
    head, files, _, _ = socket.recv_fds(requests, SIZE_LEN, MAX_FILES)
    if len(head) < SIZE_LEN:
        return b"", files
    data = bytearray()
    size = int.from_bytes(head, "big")
    while len(data) < size:
        if not (part := requests.recv(size - len(data))):
            return b"", files
        data += part
    return bytes(data), files


def send(requests: socket.socket, start: Start, files: Sequence[int]) -> None:
    """Sends a message that `_receive` reads."""
    data = msgspec.msgpack.encode(start)
    socket.send_fds(requests, [len(data).to_bytes(SIZE_LEN, "big")], files)
    requests.sendall(data)


if __name__ == "__main__":
    main()
