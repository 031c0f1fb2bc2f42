"""Frames of the TCP transport: a fixed head, a msgpack header, and for layers their rows.

    4 bytes "SGKV", 4 bytes length of the header, 8 bytes length of the payload, header, payload

Lengths are bounded and must be those of the piece, so a frame that does not follow the protocol is noticed before its
payload is read, and the connection is closed.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from sageLLM.runtime.transport.handle import SignedHandle
from sageLLM.runtime.transport.sockets import receive_into

MAGIC = b"SGKV"
HEAD = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 2**20
MAX_PAYLOAD_BYTES = 2**31


class FrameError(Exception):
    """The other end does not follow the protocol."""


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """The layers of this source rank's part of a piece follow, in order."""

    handle: SignedHandle
    source_rank: int


class Layers(msgspec.Struct, tag="layers", frozen=True):
    """The payload has the rows of `count` successive layers."""

    first: int
    count: int


class End(msgspec.Struct, tag="end", frozen=True):
    """The piece is complete; the other side answers with a `Reply`, in the order of the pieces."""


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """Whether the piece was written; otherwise the reason."""

    reason: str | None = None


Header = Begin | Layers | End | Reply
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Header)


def send_header(stream: socket.socket, header: Header, num_payload: int = 0) -> None:
    """Sends the beginning of a frame; `num_payload` bytes must follow. Raises OSError."""
    data = _encoder.encode(header)
    stream.sendall(HEAD.pack(MAGIC, len(data), num_payload) + data)


def receive_header(stream: socket.socket) -> tuple[Header, int]:
    """The header of the next frame, and the length of the payload that follows it. Raises FrameError and OSError."""
    head = bytearray(HEAD.size)
    receive_into(stream, memoryview(head))
    magic, num_header, num_payload = HEAD.unpack(head)
    if magic != MAGIC or num_header > MAX_HEADER_BYTES or num_payload > MAX_PAYLOAD_BYTES:
        raise FrameError(f"expected a frame, got {bytes(head)!r}")
    data = bytearray(num_header)
    receive_into(stream, memoryview(data))
    try:
        header: Header = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise FrameError(f"the header cannot be decoded: {error}") from None
    if num_payload and not isinstance(header, Layers):
        raise FrameError("only a frame of layers has a payload")
    return header, num_payload
