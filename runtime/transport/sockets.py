"""Whole buffers through blocking sockets."""

import errno
import os
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice

MAX_PARTS = os.sysconf("SC_IOV_MAX")


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


def _drop(parts: deque[memoryview], num_bytes: int) -> None:
    """Removes so many bytes from the front."""
    while parts and num_bytes >= len(parts[0]):
        num_bytes -= len(parts.popleft())
    if num_bytes:
        parts[0] = parts[0][num_bytes:]
