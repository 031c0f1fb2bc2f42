"""A worker process: one rank of a group, which executes the orders that arrive on an inherited socket.

    python -m sageLLM.runtime.worker.process FD

The first message is the `WorkerSpec`. The socket has no address, so no other process can connect to it. The process
ends when the engine closes its end, or when its parent has died.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.kernels.cpu.communicator import close_communicator, has_communicator, open_communicator
from sageLLM.runtime.kernels.cpu.compiler import CompileError, find_compiler
from sageLLM.runtime.worker.build import WorkerSpec, build_executor
from sageLLM.runtime.worker.executor import InProcessExecutor
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.orders import GroupOrder, StepResult

PARENT_CHECK_SECONDS = 0.5
RENDEZVOUS_SECONDS = 120.0


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker is built."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """The worker cannot be built, because of an input of the user."""

    message: str


class Done(msgspec.Struct, tag="done", frozen=True):
    """An order is complete. Only rank 0 sends results; those of the other ranks are equal."""

    results: list[StepResult]


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """An order, or the start, has failed; the state of the worker is not defined any more."""

    message: str


class Reset(msgspec.Struct, tag="reset", frozen=True):
    """Drop all sequences."""


class Run(msgspec.Struct, tag="run", frozen=True):
    """Execute an order."""

    order: GroupOrder


Reply = Ready | Refused | Done | Failed
Command = Reset | Run


def main() -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    encoder = msgspec.msgpack.Encoder()
    try:
        spec = msgspec.msgpack.decode(connection.recv_bytes(), type=WorkerSpec)
        reply: Reply
        try:
            executor = _build(spec)
            reply = Ready()
        except SageError as error:
            reply = Refused(str(error))
        except Exception as error:
            reply = Failed(f"{type(error).__name__}: {error}")
        connection.send_bytes(encoder.encode(reply))
        if isinstance(reply, Ready):
            serve(connection, executor, is_first=spec.rank == 0)
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the engine has closed the socket
    finally:
        connection.close()
        # Not an ordinary exit: the destructors of torch.distributed can wait for ranks that have ended already.
        os._exit(0)


def serve(connection: Connection, executor: InProcessExecutor, *, is_first: bool) -> None:
    """Executes commands until the connection is closed (EOFError) or an order fails."""
    decoder, encoder = msgspec.msgpack.Decoder(Command), msgspec.msgpack.Encoder()
    while True:
        command = decoder.decode(connection.recv_bytes())
        if isinstance(command, Reset):
            executor.reset()
            continue
        try:
            results = executor.execute(command.order)
        except Exception as error:
            connection.send_bytes(encoder.encode(Failed(f"{type(error).__name__}: {error}")))
            return
        if is_first:
            connection.send_bytes(encoder.encode(Done(results)))


def _build(spec: WorkerSpec) -> InProcessExecutor:
    if spec.tp > 1:
        assert spec.rendezvous is not None, "ranks need a file to find each other"
        store = FileStore(spec.rendezvous, spec.tp)
        backend = "nccl" if spec.device.startswith("cuda") else "gloo"
        timeout = timedelta(seconds=RENDEZVOUS_SECONDS)
        dist.init_process_group(backend, store=store, rank=spec.rank, world_size=spec.tp, timeout=timeout)
        if spec.device.startswith("cuda"):
            torch.cuda.set_device(spec.rank)
        elif spec.shared_memory is not None:
            _open_communicator(spec.shared_memory, spec.rank, spec.tp)
    return build_executor(spec)


def _open_communicator(shared_memory: int, rank: int, num_ranks: int) -> None:
    """Opens the collectives of the CPU kernels, if all ranks can: all must use the same ones."""
    try:
        open_communicator(shared_memory, rank, num_ranks, find_compiler())
    except (CompileError, OSError) as error:
        LOG.warning("rank %d uses torch.distributed for collectives: %s", rank, error)
    can_all = torch.tensor([int(has_communicator())])
    dist.all_reduce(can_all, dist.ReduceOp.MIN)
    if not can_all.item():
        close_communicator()


def _end_with_parent(parent: int) -> None:
    """Ends the process when its parent has died, also in the middle of a step or of a collective."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
