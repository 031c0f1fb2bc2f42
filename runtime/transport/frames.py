"""Frames of the TCP transport: a fixed head, a msgpack header, and for a layer its rows.

    4 bytes "SGKV", 4 bytes length of the header, 8 bytes length of the payload, header, payload

Lengths are bounded and must be those of the piece, so a frame that does not follow the protocol is noticed before its
payload is read, and the connection is closed.
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Sequence
from itertools import islice

import msgspec

from sageLLM.runtime.transport.handle import SignedHandle

MAGIC = b"SGKV"
HEAD = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 2**20
MAX_PAYLOAD_BYTES = 2**31
MAX_PARTS = os.sysconf("SC_IOV_MAX")


class FrameError(Exception):
    """The other end does not follow the protocol."""


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """The layers of this source rank's part of a piece follow, in order."""

    handle: SignedHandle
    source_rank: int


class Layer(msgspec.Struct, tag="layer", frozen=True):
    """The payload has the rows of a layer."""

    layer: int


class End(msgspec.Struct, tag="end", frozen=True):
    """The piece is complete; the other side answers with a `Reply`."""


class Reply(msgspec.Struct, tag="reply", frozen=True):
    """Whether the piece was written; otherwise the reason."""

    reason: str | None = None


Header = Begin | Layer | End | Reply
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Header)


def send_frame(stream: socket.socket, header: Header, payload: Sequence[memoryview] = ()) -> None:
    """Sends a frame. Raises OSError."""
    data = _encoder.encode(header)
    head = HEAD.pack(MAGIC, len(data), sum(len(part) for part in payload)) + data
    parts = deque([memoryview(head), *payload])
    while parts:
        _drop(parts, stream.sendmsg(list(islice(parts, MAX_PARTS))))


def _drop(parts: deque[memoryview], num_bytes: int) -> None:
    """Removes so many bytes from the front."""
    while parts and num_bytes >= len(parts[0]):
        num_bytes -= len(parts.popleft())
    if num_bytes:
        parts[0] = parts[0][num_bytes:]


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
    if num_payload and not isinstance(header, Layer):
        raise FrameError("only the frame of a layer has a payload")
    return header, num_payload


def receive_into(stream: socket.socket, *buffers: memoryview) -> None:
    """Fills the buffers. Raises FrameError at the end of the stream."""
    parts = deque(buffers)
    while parts:
        received, *_ = stream.recvmsg_into(list(islice(parts, MAX_PARTS)), 0, socket.MSG_WAITALL)
        if not received:
            raise FrameError("the connection was closed in the middle of a frame")
        _drop(parts, received)
