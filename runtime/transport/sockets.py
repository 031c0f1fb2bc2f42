"""Blocking sockets: whole buffers, limits of waits, and threads that serve the connections of a listener."""

import errno
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice

LOG = logging.getLogger("sagellm")
_BYTES_ACKED = 120
"""The place of `tcpi_bytes_acked` in Linux's `struct tcp_info`."""
DISCARDED_BYTES = 2**17
MAX_PARTS = os.sysconf("SC_IOV_MAX")
MAX_CONNECTIONS = 256
"""Connections of a listener at the same time, with those that have not proved yet that they have the key."""
PAUSE_SECONDS = 0.5
"""The pause after a connection that could not be made or accepted, such as for lack of file descriptors."""


CONNECT_SECONDS = 1.0
"""The time for one attempt. The kernel doubles its pauses within one, and would notice late that a link is back."""
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ETIMEDOUT)


def connect(address: str, seconds: float, is_wanted: Callable[[], bool]) -> socket.socket:
    """A connection to "HOST:PORT". A host that cannot be reached is tried again while the connection `is_wanted`.

    Raises OSError after so many seconds, when it is not wanted any more, and at once for a refused connection.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
        except OSError as error:
            is_unreachable = isinstance(error, TimeoutError) or error.errno in _UNREACHABLE
            if not is_unreachable or not is_wanted() or time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE_SECONDS)


class Connections:
    """Serves each connection of a listening socket in a thread, up to MAX_CONNECTIONS at a time, until `close`.

    A connection is closed when `serve` returns; further ones are closed at once.
    """

    def __init__(self, listener: socket.socket, name: str, serve: Callable[[socket.socket], None]) -> None:
        self._listener, self._name, self._serve = listener, name, serve
        self._open: set[socket.socket] = set()
        self._is_closed = False
        threading.Thread(target=self._accept, name=f"{name}-listener", daemon=True).start()

    def close(self) -> None:
        """Closes the listener, and ends the waits of all connections."""
        self._is_closed = True
        shut(self._listener)
        self._listener.close()
        for stream in list(self._open):
            shut(stream)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                stream, _ = self._listener.accept()
            except OSError as error:
                if not self._is_closed:
                    LOG.warning("a connection could not be accepted: %s", error)
                    time.sleep(PAUSE_SECONDS)
                continue
            if len(self._open) < MAX_CONNECTIONS:
                self._begin(stream)
            else:
                stream.close()

    def _begin(self, stream: socket.socket) -> None:
        self._open.add(stream)
        try:
            threading.Thread(target=self._run, args=(stream,), name=self._name, daemon=True).start()
        except RuntimeError as error:  # the system has no thread left
            LOG.warning("a connection could not be served: %s", error)
            self._open.discard(stream)
            stream.close()

    def _run(self, stream: socket.socket) -> None:
        try:
            if not self._is_closed:
                self._serve(stream)
        finally:
            self._open.discard(stream)
            stream.close()


def limit_waits(stream: socket.socket, seconds: float) -> None:
    """Lets the kernel fill whole buffers, and end a wait without progress with an OSError."""
    stream.setblocking(True)
    limit = struct.pack("ll", int(seconds), 0)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def is_idle(stream: socket.socket) -> bool:
    """Whether the other end has neither closed the connection nor sent anything."""
    try:
        stream.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def acknowledged_bytes(stream: socket.socket) -> int:
    """The bytes that the other end's system has received; 0 on other systems than Linux and for a closed socket."""
    if not hasattr(socket, "TCP_INFO"):
        return 0
    try:
        info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return 0
    return int.from_bytes(info[_BYTES_ACKED:], sys.byteorder)


def shut(stream: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Ends all waits for the socket, in any thread, or those in one direction."""
    with suppress(OSError):
        stream.shutdown(how)


def send_parts(stream: socket.socket, parts: Sequence[memoryview]) -> None:
    """Sends all parts. Raises OSError."""
    left = deque(parts)
    while left:
        _drop(left, stream.sendmsg(list(islice(left, MAX_PARTS))))


def receive_into(stream: socket.socket, *buffers: memoryview) -> None:
    """Fills the buffers. Raises OSError, also at the end of the stream."""
    left = deque(buffers)
    while left:
        received, *_ = stream.recvmsg_into(list(islice(left, MAX_PARTS)), 0, socket.MSG_WAITALL)
        if not received:
            raise ConnectionResetError(errno.ECONNRESET, "the other end has closed the connection")
        _drop(left, received)


def discard(stream: socket.socket, num_bytes: int) -> None:
    """Receives bytes that are not used. Raises OSError, also at the end of the stream."""
    unused = memoryview(bytearray(min(num_bytes, DISCARDED_BYTES)))
    while num_bytes:
        receive_into(stream, unused[: min(num_bytes, DISCARDED_BYTES)])
        num_bytes -= min(num_bytes, DISCARDED_BYTES)


def _drop(parts: deque[memoryview], num_bytes: int) -> None:
    """Removes so many bytes from the front."""
    while parts and num_bytes >= len(parts[0]):
        num_bytes -= len(parts.popleft())
    if num_bytes:
        parts[0] = parts[0][num_bytes:]
