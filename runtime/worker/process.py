"""A worker process: one rank of a group, which executes the orders that arrive on an inherited socket.

A fork server starts it. On the host of the engine the socket has no address, so no other process can connect to it;
another host has connected and authenticated it (`node.py`). The process ends when the engine closes its end, or when
its parent, the fork server, has ended.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import msgspec
import torch

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.transport.base import Report
from sageLLM.runtime.worker.build import WorkerSpec, build_executor
from sageLLM.runtime.worker.executor import InProcessExecutor
from sageLLM.runtime.worker.fingerprint import fingerprint
from sageLLM.runtime.worker.io_report import IoReport
from sageLLM.runtime.worker.kv_group import CancelKV, CheckKV, KVCommand, KVPort, PushKV
from sageLLM.runtime.worker.orders import GroupOrder, StepResult
from sageLLM.runtime.worker.ranks import join_ranks
from sageLLM.runtime.worker.step_gate import StepCounter

PARENT_CHECK_SECONDS = 0.5


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker is built; `facts` must be those of the other ranks. `address` is that of its KV transport."""

    facts: dict[str, str] = {}
    address: str = ""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The worker cannot be built, because of an input of the user."""

    message: str


class Done(msgspec.Struct, tag="done", frozen=True):
    """An order is complete. Only the first rank of the last stage sends results; those of its other ranks are equal."""

    results: list[StepResult]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """An order, or the start, has failed; the state of the worker is not defined any more."""

    message: str


class Reset(msgspec.Struct, tag="reset", frozen=True):
    """Drop all sequences."""


class Run(msgspec.Struct, tag="run", frozen=True):
    """Execute an order."""

    order: GroupOrder


class ReportIo(msgspec.Struct, tag="report_io", frozen=True):
    """Report the transfers between tiers, planned with the rates of this hardware."""

    hardware: Hardware


class IoReported(msgspec.Struct, tag="io_reported", frozen=True):
    """The transfers between tiers of each graph of the rank."""

    reports: list[IoReport]


Reply = Ready | Refused | Done | Failed | Report | IoReported
OrderCommand = Reset | Run | ReportIo
Command = OrderCommand | KVCommand


def run(spec: WorkerSpec, descriptor: int, parent: int) -> None:
    """Serves orders that arrive on the descriptor; ends the process."""
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    replies = Replies(connection)
    port = steps = None
    exit_code = 1  # unless the engine ends the process
    try:
        if spec.cores:  # before there are threads, which inherit it
            os.sched_setaffinity(0, spec.cores)
        reply: Reply
        try:
            executor = build_executor(spec, join_ranks(spec))
            if spec.group is not None:
                runner = executor.decoder.runner
                steps = StepCounter(runner)
                port = KVPort(spec.group, spec.rank, runner.pool, replies.send, steps)
            reply = Ready(facts_of(spec, executor), "" if port is None else port.address)
        except SageError as error:
            reply = Refused(str(error))
        except Exception as error:
            reply = Failed(f"{type(error).__name__}: {error}")
        replies.send(reply)
        if isinstance(reply, Ready):
            serve(connection, replies, executor, port, steps, returns_results=spec.returns_results)
        exit_code = 0
    except (EOFError, OSError, KeyboardInterrupt):
        exit_code = 0  # the engine has closed the socket
    finally:
        connection.close()
        # Not an ordinary exit: the destructors of torch.distributed can wait for ranks that have ended already.
        os._exit(exit_code)


class Replies:
    """Sends replies from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, reply: Reply) -> None:
        with self._lock:
            self._connection.send_bytes(self._encoder.encode(reply))


@torch.inference_mode()
def serve(
    connection: Connection,
    replies: Replies,
    executor: InProcessExecutor,
    port: KVPort | None,
    steps: StepCounter | None,
    *,
    returns_results: bool,
) -> None:
    """Executes commands until the connection is closed (EOFError) or an order fails.

    In inference mode, as entering it takes time in each step.
    """
    for command in received(connection, port):
        if isinstance(command, Reset):
            executor.reset()
        elif isinstance(command, ReportIo):
            replies.send(IoReported(executor.io_reports(command.hardware)))
        elif isinstance(command, Run):
            if steps is not None:
                steps.begin()
            try:
                results = executor.execute(command.order)
            except Exception as error:
                if steps is not None:
                    steps.has_failed = True
                replies.send(Failed(reason_of_failure(error)))
                return
            if steps is not None:
                steps.end()
            if returns_results:
                replies.send(Done(results))


def received(connection: Connection, port: KVPort | None) -> Iterator[OrderCommand]:
    """The commands for the thread that executes orders; ends with EOFError when the connection is closed.

    Those for the port are handled at once, in a thread: a copy must begin and stop while a long step is computed.
    """
    if port is None:
        decoder = msgspec.msgpack.Decoder(OrderCommand)
        while True:
            yield decoder.decode(connection.recv_bytes())
    commands: SimpleQueue[OrderCommand | BaseException] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, port, commands), name="sagellm-commands", daemon=True).start()
    while not isinstance(command := commands.get(), BaseException):
        yield command
    raise command


def _receive(connection: Connection, port: KVPort, commands: SimpleQueue[OrderCommand | BaseException]) -> None:
    decoder = msgspec.msgpack.Decoder(Command)
    try:
        while True:
            command = decoder.decode(connection.recv_bytes())
            if isinstance(command, PushKV | CheckKV | CancelKV):
                port.handle(command)
            else:
                commands.put(command)
    except BaseException as error:
        commands.put(error)


_NO_MEMORY = ("allocate memory", "cannot allocate ", "bad_alloc")
"""Texts of the errors that torch, the C++ kernels and the C++ library raise in place of a MemoryError."""


def reason_of_failure(error: Exception) -> str:
    """The reason in the engine's message about a worker that has failed."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(cause in text for cause in _NO_MEMORY):
        return f"out of memory; lower max_num_batched_tokens or num_kv_blocks, or use more ranks ({text})"
    return text


def facts_of(spec: WorkerSpec, executor: InProcessExecutor) -> dict[str, str]:
    """What all ranks must agree on, and a worker that starts again while others have its KV."""
    if spec.num_ranks == 1 and spec.group is None:
        return {}
    runner = executor.decoder.runner
    return fingerprint(Path(spec.model), runner.model, runner.compiler)


def end_with_parent(parent: int) -> None:
    """Ends the process when its parent has died, also in the middle of a step or of a collective.

    `parent` is known from before the fork: the parent may have died since.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)
