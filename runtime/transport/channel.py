"""Authenticated TCP connections between the hosts of an engine.

Both ends prove that they have the same key by an HMAC over random numbers of both, before any message is decoded. The
messages after that are neither encrypted nor signed: the network must be trusted.
"""

import fcntl
import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.transport.sockets import shut

KEY_VARIABLE, KEY_FILE_VARIABLE = "SAGELLM_KEY", "SAGELLM_KEY_FILE"
MIN_KEY_LENGTH = 16
NONCE_BYTES = 32
AUTHENTICATION_SECONDS = 10.0
_SIOCGIFADDR = 0x8915


class AuthenticationError(Exception):
    """The other end does not have the key, or is not a process of this engine."""


def read_key() -> bytes:
    """The key in SAGELLM_KEY, or in the file that SAGELLM_KEY_FILE names. Raises SageError without one."""
    key = os.environ.get(KEY_VARIABLE, "")
    path = os.environ.get(KEY_FILE_VARIABLE)
    if not key and path:
        try:
            key = Path(path).read_text().strip()
        except OSError as error:
            raise SageError(f"cannot read the key of the hosts: {error}") from None
    if len(key) < MIN_KEY_LENGTH:
        raise SageError(
            f"several hosts require a shared key of at least {MIN_KEY_LENGTH} characters, got {len(key)}; set "
            f"{KEY_VARIABLE}, or {KEY_FILE_VARIABLE} to a file with it, to the same value on all hosts"
        )
    return key.encode()


def listen(address: str, port: int) -> socket.socket:
    """A listening socket. Raises SageError if the port is in use or the address is not one of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        remedy = "choose another master_port" if error.errno == 98 else "set master_addr to an address of this host"
        raise SageError(f"cannot listen on {address}:{port}: {error.strerror}; {remedy}") from None
    return listener


def connect(address: str, port: int, key: bytes, seconds: float) -> Connection:
    """Connects to the engine, waiting for it to start. Raises SageError after `seconds`, or for another key."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            stream = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise SageError(
                    f"cannot reach the engine at {address}:{port} within {seconds:.0f} s: {error}; start node 0, or "
                    "check master_addr and master_port"
                ) from None
            time.sleep(0.1)
    connection = _as_connection(stream)
    try:
        answer_challenge(connection, key)
    except AuthenticationError as error:
        connection.close()
        raise SageError(f"the engine at {address}:{port} was not accepted: {error}") from None
    return connection


def accept(listener: socket.socket, key: bytes) -> tuple[Connection, str]:
    """Accepts one connection of a process with the key, and its address. Raises AuthenticationError for others."""
    stream, address = listener.accept()
    connection = _as_connection(stream)
    try:
        challenge(connection, key)
    except AuthenticationError:
        connection.close()
        raise
    return connection, str(address[0])


def challenge(connection: Connection, key: bytes) -> None:
    """The engine's side of the handshake. Raises AuthenticationError."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    with _deadline(connection, "it has closed the connection"):
        connection.send_bytes(nonce)
        theirs, proof = _split(_receive(connection, 2 * NONCE_BYTES))
        if not hmac.compare_digest(proof, _proof(key, b"node", nonce, theirs)):
            raise AuthenticationError("it has another key")
        connection.send_bytes(_proof(key, b"engine", theirs, nonce))


def answer_challenge(connection: Connection, key: bytes) -> None:
    """The other side of the handshake. Raises AuthenticationError."""
    own = secrets.token_bytes(NONCE_BYTES)
    with _deadline(connection, "it has closed the connection; set the same key on all hosts"):
        nonce = _receive(connection, NONCE_BYTES)
        connection.send_bytes(own + _proof(key, b"node", nonce, own))
        if not hmac.compare_digest(_receive(connection, NONCE_BYTES), _proof(key, b"engine", own, nonce)):
            raise AuthenticationError("it has another key")


@contextmanager
def _deadline(connection: Connection, closed: str) -> Iterator[None]:
    """Ends a handshake after AUTHENTICATION_SECONDS in all, also one of which bytes arrive one by one.

    A handshake whose connection is `closed` raises AuthenticationError with this reason.
    """
    is_late = threading.Event()
    with socket.socket(fileno=os.dup(connection.fileno())) as stream:

        def end() -> None:
            is_late.set()
            shut(stream)

        timer = threading.Timer(AUTHENTICATION_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except (OSError, EOFError):
            raise AuthenticationError(_late() if is_late.is_set() else closed) from None
        finally:
            timer.cancel()


def interface_of(address: str) -> str | None:
    """The network interface of this host with an IPv4 address; None if not found."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def local_address(connection: Connection) -> str:
    """The address of this end."""
    with socket.socket(fileno=os.dup(connection.fileno())) as stream:
        return str(stream.getsockname()[0])


def _as_connection(stream: socket.socket) -> Connection:
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Connection(stream.detach())


def _receive(connection: Connection, num_bytes: int) -> bytes:
    if not connection.poll(AUTHENTICATION_SECONDS):
        raise AuthenticationError(_late())
    data = connection.recv_bytes(num_bytes)
    if len(data) != num_bytes:
        raise AuthenticationError("it does not follow the protocol")
    return data


def _late() -> str:
    return f"it has not answered within {AUTHENTICATION_SECONDS:g} s"


def _split(data: bytes) -> tuple[bytes, bytes]:
    return data[:NONCE_BYTES], data[NONCE_BYTES:]


def _proof(key: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(key, role + first + second, "sha256")
