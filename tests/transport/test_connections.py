"""Connections between engines: handshakes that end in time, their number, and streams that were idle for long."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Event, Thread

import pytest

from sageLLM.runtime.transport import channel, sockets
from sageLLM.runtime.transport.sockets import Connections, is_idle

KEY = b"k" * 32


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = socket.socketpair()
    with first, second:
        yield first, second


@pytest.mark.parametrize("interval", [None, 0.2], ids=["silent", "byte by byte"])
def test_a_handshake_ends_in_time(monkeypatch: pytest.MonkeyPatch, interval: float | None) -> None:
    monkeypatch.setattr(channel, "AUTHENTICATION_SECONDS", 1.0)
    with pair() as (ours, theirs), Connection(ours.detach()) as connection:
        theirs.sendall(b"\0\0\0\x40")  # the length of a message that does not come whole
        is_over = Event()

        def send() -> None:
            while interval is not None and not is_over.wait(interval):
                theirs.sendall(b"\0")

        thread = Thread(target=send)
        thread.start()
        with pytest.raises(channel.AuthenticationError, match="not answered within 1 s"):
            channel.challenge(connection, KEY)
        is_over.set()
        thread.join()


def test_a_stream_is_idle_until_the_other_end_closes_it() -> None:
    with pair() as (ours, theirs):
        assert is_idle(ours)
        theirs.close()
        assert not is_idle(ours)


def test_connections_are_bounded_and_end_with_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MAX_CONNECTIONS", 2)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()

    def serve(stream: socket.socket) -> None:
        stream.sendall(b"in")
        stream.recv(1)

    connections = Connections(listener, "test", serve)
    streams = [socket.create_connection(address, timeout=20) for _ in range(2)]
    assert [stream.recv(2) for stream in streams] == [b"in", b"in"]
    with socket.create_connection(address, timeout=20) as third:
        assert third.recv(2) == b"", "more are closed"
    streams.pop().close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # its thread ends
        with socket.create_connection(address, timeout=20) as fourth:
            if fourth.recv(2) == b"in":
                break
    else:
        raise AssertionError("no place became free")
    connections.close()
    assert streams[0].recv(1) == b""
    with pytest.raises(OSError):
        socket.create_connection(address, timeout=1)
    streams[0].close()


def test_a_connection_without_a_thread_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    connections = Connections(listener, "test", lambda stream: stream.sendall(b"in"))

    def start(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(sockets.threading.Thread, "start", start)
        with socket.create_connection(address, timeout=20) as stream:
            assert stream.recv(2) == b""
    with socket.create_connection(address, timeout=20) as stream:
        assert stream.recv(2) == b"in", "the listener goes on"
    connections.close()
