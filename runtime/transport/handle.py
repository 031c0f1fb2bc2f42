"""Handles of KV transfers: the engine makes and signs them, and both ends check them before they copy anything."""

from __future__ import annotations

import hmac
from typing import NamedTuple

import msgspec


class PieceKey(NamedTuple):
    """Identifies one piece of one attempt to transfer the KV of a request."""

    request_id: str
    start: int
    attempt: int


class End(msgspec.Struct, frozen=True, array_like=True):
    """One end of a transfer: the number of the worker, its epoch (the count of its starts), and the blocks there."""

    worker: int
    epoch: int
    blocks: list[int]


class Handle(msgspec.Struct, frozen=True, array_like=True):
    """A piece of KV to copy: tokens `start .. start + num_tokens - 1` of a request.

    Token t is in block `blocks[t // block_size - start // block_size]` of each end, with the block size of that end.
    """

    request_id: str
    attempt: int
    start: int
    num_tokens: int
    source: End
    target: End

    @property
    def key(self) -> PieceKey:
        return PieceKey(self.request_id, self.start, self.attempt)


class SignedHandle(msgspec.Struct, frozen=True, array_like=True):
    """An encoded `Handle` with its HMAC."""

    data: bytes
    signature: bytes


class HandleError(Exception):
    """The handle is forged, or belongs to another epoch of this worker."""


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Handle)


def sign(handle: Handle, key: bytes) -> SignedHandle:
    """The handle in the form that workers accept."""
    data = _encoder.encode(handle)
    return SignedHandle(data, _signature(data, key))


def open_handle(signed: SignedHandle, key: bytes) -> Handle:
    """The handle inside. Raises HandleError if its signature is not that of the key."""
    if not hmac.compare_digest(signed.signature, _signature(signed.data, key)):
        raise HandleError("the signature of the handle is not that of this engine")
    try:
        return _decoder.decode(signed.data)
    except msgspec.MsgspecError as error:
        raise HandleError(f"the handle cannot be decoded: {error}") from None


def _signature(data: bytes, key: bytes) -> bytes:
    return hmac.digest(key, b"kv-handle" + data, "sha256")
