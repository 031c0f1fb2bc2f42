"""Event streams: frames of chunks, and comments that keep an idle stream open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import msgspec

from sageLLM.runtime.server.exchange import Exchange
from sageLLM.runtime.server.generation import Generation, Piece

T = TypeVar("T")
encode = msgspec.json.Encoder().encode
COMMENT = b": keep-alive\n\n"
PLACE = "\0text\0"


def frame(chunk: Mapping[str, Any]) -> bytes:
    """The event of one object."""
    return b"data: " + encode(chunk) + b"\n\n"


class TextFrame:
    """Frames of chunks that differ in one text. Most chunks of a stream do, so the rest is encoded once."""

    def __init__(self, chunk: Mapping[str, Any]) -> None:
        """`chunk` has PLACE as this text."""
        self._before, _, self._after = frame(chunk).rpartition(encode(PLACE))

    def __call__(self, text: str) -> bytes:
        return self._before + encode(text) + self._after


def steps_of(
    generation: Generation, exchange: Exchange, seconds: float, framed: Callable[[Piece], bytes] | None
) -> AsyncIterator[list[Piece]]:
    """The steps of a stream; a comment is written whenever none came for so long. 0 turns this off.

    `framed` makes the events of a piece with nothing but text, for which the stream's reader need not be woken.
    """
    if seconds:
        return _with_comments(generation.steps(), exchange, seconds)
    if framed is not None and exchange.writer is not None:
        generation.stream_to(exchange.writer, framed)
    return generation.steps()


async def _with_comments(steps: AsyncIterator[T], exchange: Exchange, seconds: float) -> AsyncIterator[T]:
    following: asyncio.Future[T | None] = asyncio.ensure_future(anext(steps, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=seconds)
            if not done:
                if not exchange.is_streaming:
                    await exchange.start_stream()
                await exchange.write(COMMENT)
                continue
            if (step := following.result()) is None:
                return
            yield step
            following = asyncio.ensure_future(anext(steps, None))
    finally:
        following.cancel()
