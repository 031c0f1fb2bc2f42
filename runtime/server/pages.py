"""The web page: a chat, gauges of the engine and a reference of the API, as static files of the package."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path

from sageLLM.runtime.server.exchange import Exchange

FOLDER = Path(__file__).parent / "web"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # The page loads nothing from elsewhere, runs no inline script, and is shown in no other page.
    "Content-Security-Policy": "default-src 'self'; style-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> dict[str, Callable[[Exchange], Awaitable[None]]]:
    """The handlers of the page's files, by path; there are no others."""
    pages = {"/": "index.html", "/docs": "reference.html"}
    assets = {f"/web/{path.name}": path.name for path in FOLDER.iterdir() if path.suffix in (".css", ".js", ".svg")}
    return {path: _sender(name) for path, name in sorted({**pages, **assets}.items())}


def _sender(name: str) -> Callable[[Exchange], Awaitable[None]]:
    kind = KINDS[Path(name).suffix]

    async def send(exchange: Exchange) -> None:
        await exchange.respond(200, _content(name), kind, HEADERS)

    return send


@cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
