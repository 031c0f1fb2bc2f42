"""The engine's ends of worker processes, on this host and on others."""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from sageLLM.runtime.worker.worker_process import WorkerProcess

END_SECONDS = 2.0
EXIT_SECONDS = 1.0
"""The wait for the exit code of a process that has closed its connection."""


def hang_up(connection: Connection) -> None:
    """Lets the process read the end of its commands, after which it ends."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_WR)


@dataclass(frozen=True, slots=True)
class Rank:
    """A worker process of this host, and the engine's end of its socket."""

    rank: int
    process: WorkerProcess
    connection: Connection

    @property
    def name(self) -> str:
        return f"worker rank {self.rank}"

    def kill(self) -> None:
        self.process.kill()

    def hang_up(self) -> None:
        """Lets the process end."""
        hang_up(self.connection)

    def await_end(self) -> None:
        """Waits for the end of the process, and kills it if that takes too long."""
        if self.process.wait(END_SECONDS) is None:
            self.process.kill()
            self.process.wait(EXIT_SECONDS)  # not for ever: the server that tells the exit code may be stopped

    def describe_end(self) -> str:
        """How the process has ended, in words; it may take a moment to end after it has closed its connection."""
        code = self.process.wait(EXIT_SECONDS)
        if code is None:
            return f"rank {self.rank} (process {self.process.pid}) closed its connection"
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        if code == -signal.SIGKILL:
            how += ", as the system does when memory is full"
        return f"rank {self.rank} (process {self.process.pid}) {how}"


@dataclass(frozen=True, slots=True)
class RemoteRank:
    """A worker process of another host, which starts and kills it."""

    rank: int
    connection: Connection
    place: str

    @property
    def name(self) -> str:
        return f"worker rank {self.rank} on {self.place}"

    def kill(self) -> None:
        """Does nothing: its host kills it, by `Cluster.stop`."""

    def hang_up(self) -> None:
        """Lets the process end."""
        hang_up(self.connection)

    def await_end(self) -> None:
        """Returns at once: its host waits for it."""

    def describe_end(self) -> str:
        """How the process has ended, in words."""
        return f"rank {self.rank} on {self.place} closed its connection"
