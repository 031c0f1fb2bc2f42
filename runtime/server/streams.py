"""Keeps an idle stream open: comments between the steps, for proxies that close quiet connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from sageLLM.runtime.server.exchange import Exchange

T = TypeVar("T")
COMMENT = b": keep-alive\n\n"


async def keep_alive(steps: AsyncIterator[T], exchange: Exchange, seconds: float) -> AsyncIterator[T]:
    """The steps; a comment is written whenever none came for so long. 0 turns this off."""
    if not seconds:
        async for one in steps:
            yield one
        return
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
