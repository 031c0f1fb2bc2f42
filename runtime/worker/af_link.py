"""Links between attention and FFN workers: a socket, and where the CPU kernels run, rings in shared memory.

A socket carries the header of each step, and shows the end of a peer. Micro-batches pass through the rings, by the
kernels `send` and `recv`, or else over the socket, too.
"""

import os
import queue
import select
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

import msgspec
import numpy as np
import torch
from torch import Tensor

from sageLLM.runtime.kernels.cpu.compiler import Compiler
from sageLLM.runtime.kernels.cpu.point_to_point import attach, break_link

GROUP = "af"
MAX_PARTS = 16
"""Micro-batches of a step between two workers."""
CLOSED = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)


class LinkLostError(Exception):
    """The other end of a link is gone."""


class LinkOffer(msgspec.Struct, frozen=True):
    """A new link to the rank `peer` of the other role. Its descriptors follow: a socket, and perhaps memory for rings.

    `side` is the end of the rings, and `ring_bytes` the size of each, 0 without rings.
    """

    peer: int
    side: int
    ring_bytes: int


def send_offer(channel: socket.socket, offer: LinkOffer, files: Sequence[int]) -> None:
    """Sends an offer with its descriptors over a Unix socket."""
    socket.send_fds(channel, [msgspec.msgpack.encode(offer).ljust(64)], files)


def receive_offer(channel: socket.socket) -> tuple[LinkOffer, list[int]]:
    """Waits for an offer. Raises EOFError if the other end is closed."""
    data, files, _, _ = socket.recv_fds(channel, 64, 2)
    if not data:
        raise EOFError("no more links")
    while len(data) < 64:
        data += channel.recv(64 - len(data))
    return msgspec.msgpack.decode(data.rstrip(b" "), type=LinkOffer), files


class Link:
    """One end of a link."""

    def __init__(self, offer: LinkOffer, files: Sequence[int], compiler: Compiler | None) -> None:
        """Takes over the descriptors. Raises CompileError if there are rings and the kernels cannot be built."""
        self.peer = offer.peer
        self.has_rings = bool(offer.ring_bytes)
        self._socket = socket.socket(fileno=files[0])
        if self.has_rings:
            try:
                attach(GROUP, offer.peer, files[1], offer.side, offer.ring_bytes, compiler)
            finally:
                os.close(files[1])
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sender: threading.Thread | None = None

    def fileno(self) -> int:
        return self._socket.fileno()

    def send_header(self, rows: Sequence[int]) -> None:
        """Begins a step with these numbers of rows of its micro-batches. Raises LinkLostError."""
        header = np.array([len(rows), *rows, *[0] * (MAX_PARTS - len(rows))], np.int32).tobytes()
        if not self.has_rings:
            self._send(header)  # in order with the rows
            return
        try:
            self._socket.sendall(header)
        except OSError as error:
            raise LinkLostError(f"the link to rank {self.peer} failed: {error}") from None

    def receive_header(self) -> list[int]:
        """Waits for the next step. Raises LinkLostError."""
        header = bytearray(4 * (MAX_PARTS + 1))
        self._receive(memoryview(header))
        numbers: list[int] = np.frombuffer(header, np.int32).tolist()
        return numbers[1 : numbers[0] + 1]

    def send(self, x: Tensor) -> None:
        """Sends rows over the socket, in a thread: both ends may have more under way than the socket's buffer holds."""
        self._send(x.contiguous().view(torch.uint8).numpy().tobytes())

    def receive(self, buffer: Tensor) -> None:
        """Waits for rows on the socket. Raises LinkLostError."""
        self._receive(buffer.view(torch.uint8).numpy().data.cast("B"))

    def shut_down(self) -> None:
        """Ends the link for both ends; a thread that waits for the peer fails."""
        if self.has_rings:
            break_link(GROUP, self.peer)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the link and closes its socket, which no other thread may use meanwhile."""
        self.shut_down()
        if self._sender is not None:
            self._outgoing.put(None)
            self._sender.join()
        self._socket.close()

    def _send(self, data: bytes) -> None:
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_all, daemon=True, name="sagellm-af-send")
            self._sender.start()
        self._outgoing.put(data)

    def _send_all(self) -> None:
        with suppress(OSError):  # the peer is gone: the next receive fails
            while (data := self._outgoing.get()) is not None:
                self._socket.sendall(data)

    def _receive(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise LinkLostError(f"the link to rank {self.peer} failed: {error}") from None
            if not count:
                raise LinkLostError(f"rank {self.peer} has closed its link")
            done += count


class Watch:
    """Breaks links with rings when their peers end: a kernel that waits for a ring cannot notice it."""

    def __init__(self, links: Iterable[Link]) -> None:
        self._links = {link.fileno(): link for link in links if link.has_rings}
        self.is_lost = False
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True, name="sagellm-af-watch")
        self._thread.start()

    def close(self) -> None:
        """Stops watching; call it before the links are closed."""
        self._stop.close()
        self._thread.join()
        self._stopped.close()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stopped, select.POLLIN)
        for file in self._links:
            poll.register(file, CLOSED)
        while True:
            for file, event in poll.poll():
                if file == self._stopped.fileno():
                    return
                if event & CLOSED:
                    self.is_lost = True
                    poll.unregister(file)
                    for link in self._links.values():  # the step fails, whichever link it waits for
                        break_link(GROUP, link.peer)
