"""A host of an engine that runs on several: starts the host's worker processes when the engine asks for them.

It ends when the engine ends, and its worker processes with it.
"""

from dataclasses import dataclass

import msgspec

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.transport.channel import connect, interface_of, local_address, read_key
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.fingerprint import versions
from sageLLM.runtime.worker.rank_processes import start_processes
from sageLLM.runtime.worker.worker_process import WorkerProcess

CONNECT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Node:
    """One of `num_nodes` hosts. The engine is on node 0, at this address and port."""

    num_nodes: int
    node_rank: int
    address: str
    port: int


class JoinNode(msgspec.Struct, tag="node", frozen=True):
    """The first message of a host."""

    node_rank: int
    num_nodes: int
    versions: dict[str, str]


class JoinRank(msgspec.Struct, tag="rank", frozen=True):
    """The first message on the connection of a worker process."""

    rank: int


class Accepted(msgspec.Struct, tag="accepted", frozen=True):
    """The host belongs to the engine."""


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """The host cannot belong to the engine."""

    reason: str


class StartRanks(msgspec.Struct, tag="start", frozen=True):
    """Start these ranks, in place of those that run."""

    spec: WorkerSpec
    ranks: list[int]


class StopRanks(msgspec.Struct, tag="stop", frozen=True):
    """Kill the worker processes."""


Join = JoinNode | JoinRank
Instruction = Accepted | Rejected | StartRanks | StopRanks


def serve_node(node: Node, seconds: float = CONNECT_SECONDS) -> None:
    """Runs the worker processes of this host until the engine ends. Raises SageError if it does not accept the host."""
    key = read_key()
    control = connect(node.address, node.port, key, seconds)
    encode = msgspec.msgpack.encode
    decoder = msgspec.msgpack.Decoder(Instruction)
    processes: list[WorkerProcess] = []
    try:
        control.send_bytes(encode(JoinNode(node.node_rank, node.num_nodes, versions())))
        while True:
            instruction = decoder.decode(control.recv_bytes())
            if isinstance(instruction, Rejected):
                raise SageError(f"the engine at {node.address}:{node.port} refused this host: {instruction.reason}")
            _kill(processes)
            if isinstance(instruction, StartRanks):
                processes = _start(node, instruction, key, interface_of(local_address(control)))
    except (EOFError, OSError):
        LOG.info("the engine at %s:%d has ended", node.address, node.port)
    finally:
        _kill(processes)
        control.close()


def _start(node: Node, start: StartRanks, key: bytes, interface: str | None) -> list[WorkerProcess]:
    connections = {rank: connect(node.address, node.port, key, CONNECT_SECONDS) for rank in start.ranks}
    for rank, connection in connections.items():
        connection.send_bytes(msgspec.msgpack.encode(JoinRank(rank)))
    files = {rank: connection.fileno() for rank, connection in connections.items()}
    processes = start_processes(start.spec, files, interface)
    for connection in connections.values():
        connection.close()  # the process has it
    return list(processes.values())


def _kill(processes: list[WorkerProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    processes.clear()
