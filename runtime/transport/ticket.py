"""Tickets for the KV of prompts: an engine that has computed a prompt says where its KV is, and another one fetches it.

A ticket passes through routers, so it is signed: an engine connects only to addresses in tickets of its own key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from sageLLM.runtime.transport.handle import End, PieceKey, SignedHandle


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """The place of the KV of a prompt: the address of an engine, its epoch, and the name of the request there.

    `prompt` is the hash of the prompt (`hash_prompt`), without which KV would be taken for that of other tokens.
    """

    host: str
    port: int
    epoch: int
    request_id: str
    prompt: bytes


class TicketError(Exception):
    """The ticket is forged, or belongs to another prompt."""


class MessageError(Exception):
    """The other end does not follow the protocol of a fetch."""


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Asks for tokens `start .. start + num_tokens - 1` of a prompt, to be pushed to the blocks of `target`.

    `key` names the copy, `address` is that of the target's transport, and `model` describes its KV.
    """

    ticket: Ticket
    key: PieceKey
    num_tokens: int
    target: End
    address: str
    model: str


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """The piece has been pushed; its digest is that of what was sent."""

    handle: SignedHandle
    digest: int
    num_tokens: int


class NotFetched(msgspec.Struct, frozen=True, tag="not_fetched"):
    """Nothing is being pushed, for the reason."""

    reason: str


def encode(message: Fetch | Fetched | NotFetched) -> bytes:
    """A message of a fetch for `decode_fetch` or `decode_answer`."""
    return _ENCODER.encode(message)


def decode_fetch(data: bytes) -> Fetch:
    """The request. Raises MessageError."""
    try:
        return _FETCHES.decode(data)
    except msgspec.MsgspecError as error:
        raise MessageError(f"a fetch cannot be decoded: {error}") from None


def decode_answer(data: bytes) -> Fetched | NotFetched:
    """The answer to a fetch. Raises MessageError."""
    try:
        return _ANSWERS.decode(data)
    except msgspec.MsgspecError as error:
        raise MessageError(f"the answer to a fetch cannot be decoded: {error}") from None


_FETCHES, _ANSWERS = msgspec.msgpack.Decoder(Fetch), msgspec.msgpack.Decoder(Fetched | NotFetched)
_ENCODER, _TICKETS = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Ticket)
_SIGNATURE_BYTES = 32


def hash_prompt(token_ids: Sequence[int], salt: str) -> bytes:
    """A hash of everything that the KV of a prompt depends on besides the model."""
    return hashlib.sha256(_ENCODER.encode((salt, list(token_ids)))).digest()


def seal(ticket: Ticket, key: bytes) -> str:
    """The ticket with its HMAC, as text."""
    data = _ENCODER.encode(ticket)
    return base64.b64encode(_signature(data, key) + data).decode()


def open_ticket(text: str, key: bytes) -> Ticket:
    """The ticket in a text of `seal`. Raises TicketError unless it has the same key."""
    try:
        sealed = base64.b64decode(text, validate=True)
    except ValueError:
        raise TicketError("expected base64") from None
    signature, data = sealed[:_SIGNATURE_BYTES], sealed[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(data, key)):
        raise TicketError("its signature is not that of this key")
    try:
        return _TICKETS.decode(data)
    except msgspec.MsgspecError as error:
        raise TicketError(f"it cannot be decoded: {error}") from None


def _signature(data: bytes, key: bytes) -> bytes:
    return hmac.digest(key, b"kv-ticket" + data, "sha256")
