"""The other hosts of an engine, each connected by `serve_node`."""

import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec

from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.transport.channel import AuthenticationError, accept, interface_of, listen, read_key
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.fingerprint import difference, versions
from sageLLM.runtime.worker.node import Accepted, Join, JoinNode, JoinRank, Node, Rejected, StartRanks, StopRanks
from sageLLM.runtime.worker.rank import RemoteRank

JOIN_SECONDS = 300.0
"""The time limit for the other hosts to connect."""
RANK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Host:
    """Another host: its number, its address, and the connection for instructions."""

    node_rank: int
    address: str
    control: Connection


class Cluster:
    """Waits for the other hosts, and starts and stops the ranks on them. Rank numbers are consecutive on each host."""

    def __init__(self, node: Node, num_ranks: int, *, seconds: float = JOIN_SECONDS) -> None:
        """Raises SageError for an address that cannot be listened on, and EngineError if a host does not connect."""
        self.node, self._per_node = node, num_ranks // node.num_nodes
        self._key = read_key()
        self._listener = listen(node.address, node.port)
        self.interface = interface_of(node.address)
        self.hosts: dict[int, Host] = {}
        try:
            self._await_hosts(time.monotonic() + seconds, seconds)
        except BaseException:
            self.close()
            raise

    def ranks_of(self, node_rank: int) -> range:
        """The ranks on a host."""
        return range(node_rank * self._per_node, (node_rank + 1) * self._per_node)

    def start(self, spec: WorkerSpec) -> list[RemoteRank]:
        """Starts the ranks of the other hosts; returns them in order."""
        for host in self.hosts.values():
            try:
                host.control.send_bytes(msgspec.msgpack.encode(StartRanks(spec, list(self.ranks_of(host.node_rank)))))
            except OSError:
                raise EngineError(f"node {host.node_rank} ({host.address}) has ended; start it again") from None
        wanted = {rank for node_rank in self.hosts for rank in self.ranks_of(node_rank)}
        found: dict[int, RemoteRank] = {}
        deadline = time.monotonic() + RANK_SECONDS
        while wanted - found.keys():
            joined = self._next(deadline)
            if joined is None:
                rank = min(wanted - found.keys())
                host = self.hosts[rank // self._per_node]
                where = f"rank {rank} on node {host.node_rank} ({host.address})"
                raise EngineError(f"{where} has not connected within {RANK_SECONDS:.0f} s")
            connection, address, join = joined
            if isinstance(join, JoinRank) and join.rank in wanted and join.rank not in found:
                place = f"node {join.rank // self._per_node} ({address})"
                found[join.rank] = RemoteRank(join.rank, connection, place)
            else:
                _reject(connection, "the engine has all its hosts")
        return [found[rank] for rank in sorted(found)]

    def stop(self) -> None:
        """Kills the ranks of the other hosts."""
        for host in self.hosts.values():
            with suppress(OSError):
                host.control.send_bytes(msgspec.msgpack.encode(StopRanks()))

    def close(self) -> None:
        """Lets the other hosts end."""
        self._listener.close()
        for host in self.hosts.values():
            host.control.close()
        self.hosts.clear()

    def _await_hosts(self, deadline: float, seconds: float) -> None:
        address = f"{self.node.address}:{self.node.port}"
        while len(self.hosts) < self.node.num_nodes - 1:
            joined = self._next(deadline)
            if joined is None:
                missing = [str(i) for i in range(1, self.node.num_nodes) if i not in self.hosts]
                raise EngineError(
                    f"node {', '.join(missing)} of {self.node.num_nodes} has not connected to {address} within "
                    f"{seconds:.0f} s; start it with `sagellm worker --node-rank {missing[0]}` and the same options"
                )
            connection, peer, join = joined
            reason = self._why_not(join)
            if reason is not None or not isinstance(join, JoinNode):
                LOG.warning("a host at %s was refused: %s", peer, reason)
                _reject(connection, reason or "expected a host")
                continue
            connection.send_bytes(msgspec.msgpack.encode(Accepted()))
            self.hosts[join.node_rank] = Host(join.node_rank, peer, connection)

    def _why_not(self, join: Join) -> str | None:
        """The reason why a host cannot belong to this engine, or None."""
        if not isinstance(join, JoinNode):
            return "expected a host"
        if join.num_nodes != self.node.num_nodes:
            return f"it has nnodes={join.num_nodes}, the engine has nnodes={self.node.num_nodes}"
        if not 1 <= join.node_rank < self.node.num_nodes:
            return f"node_rank must be 1 to {self.node.num_nodes - 1}, got {join.node_rank}"
        if join.node_rank in self.hosts:
            return f"node {join.node_rank} is connected already, from {self.hosts[join.node_rank].address}"
        differing = difference(versions(), join.versions)
        return None if differing is None else f"the engine and the host differ: {differing}"

    def _next(self, deadline: float) -> tuple[Connection, str, Join] | None:
        """The next authenticated connection and its first message; None after the deadline."""
        while (left := deadline - time.monotonic()) > 0:
            self._listener.settimeout(left)
            try:
                connection, address = accept(self._listener, self._key)
            except TimeoutError:
                return None
            except AuthenticationError as error:
                LOG.warning("a connection to %s:%d was refused: %s", self.node.address, self.node.port, error)
                continue
            try:
                if connection.poll(left):
                    return connection, address, msgspec.msgpack.decode(connection.recv_bytes(), type=Join)
            except (OSError, EOFError, msgspec.MsgspecError):
                pass
            connection.close()
        return None


def _reject(connection: Connection, reason: str) -> None:
    with suppress(OSError):
        connection.send_bytes(msgspec.msgpack.encode(Rejected(reason)))
    connection.close()
