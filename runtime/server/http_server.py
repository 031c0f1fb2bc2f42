"""Runs the application under uvicorn, with a drain at SIGTERM."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from uvicorn import Config, Server

from sageLLM.runtime.server.app import make_app
from sageLLM.runtime.server.http_protocol import protocol_of
from sageLLM.runtime.server.messages import Ready
from sageLLM.runtime.server.service import Service
from sageLLM.runtime.server.settings import ServerSettings

LOG = logging.getLogger("sagellm")
POLL_SECONDS = 0.05
GRACE_SECONDS = 5
BACKLOG = 2048


class DrainingServer(Server):
    """uvicorn's server with another end: SIGTERM and SIGINT let admitted requests finish, a second one aborts them."""

    def __init__(self, config: Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not recorded as uvicorn does, which would raise the signal again at the end: the exit code is 0."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.begin_drain, signal.Signals(sig).name)

    def begin_drain(self, cause: str) -> None:
        if self._drain is not None:
            LOG.warning("%s again: %d requests are aborted", cause, self._service.num_active)
            self._end(is_forced=True)
            return
        LOG.warning("%s: no new requests, %d admitted ones finish", cause, self._service.num_active)
        self._service.admission.is_draining = True
        self._drain = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        """Ends the server once no request is active, or after the timeout."""
        timeout = self._service.settings.shutdown_timeout
        try:
            async with asyncio.timeout(timeout):
                while self._service.num_active:
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            LOG.warning("%d requests are aborted after %g s", self._service.num_active, timeout)
        self._end(is_forced=bool(self._service.num_active))

    def _end(self, *, is_forced: bool) -> None:
        if is_forced:
            self._service.client.abort_all("the server is shutting down")
        self.should_exit = True


def make_server(service: Service) -> DrainingServer:
    settings = service.settings
    app = make_app(service)
    config = Config(
        app,
        http=protocol_of(app.gate),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=round(settings.keep_alive_timeout),
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return DrainingServer(config, service)


def bind(settings: ServerSettings) -> socket.socket:
    """The listening socket. Raises OSError if the address cannot be used."""
    if settings.uds is not None:
        path = Path(settings.uds)
        if path.exists() and not path.is_socket():
            raise FileExistsError(f"uds must be a socket or a new name, got the file {path}")
        path.unlink(missing_ok=True)  # of a server that was killed
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(settings.uds)
        sock.listen(BACKLOG)
        return sock
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)


def why_open(settings: ServerSettings, sock: socket.socket) -> str | None:
    """The reason why hosts besides this one can send requests without a key, or None if they cannot."""
    if settings.api_key or sock.family == socket.AF_UNIX:
        return None
    address = sock.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback:
        return None
    return f"other hosts reach {address} without a key; set SAGELLM_API_KEY, or listen on 127.0.0.1"


def url_of(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run_server(service: Service, sock: socket.socket, on_ready: Callable[[Ready, str], None]) -> int:
    """Serves until a signal, or until the engine cannot be started; returns the exit code.

    Connections are answered while the engine is built, with 503. Raises what `Service.start` raises.
    """
    server, url = make_server(service), url_of(sock)
    serving = asyncio.create_task(server.serve([sock]))
    starting = asyncio.create_task(service.start())
    giving_up = asyncio.create_task(service.client.gave_up.wait())
    try:
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            on_ready(starting.result(), url)
            await asyncio.wait({serving, giving_up}, return_when=asyncio.FIRST_COMPLETED)
        return 1 if giving_up.done() else 0
    finally:
        for task in (starting, giving_up):
            task.cancel()
        server.should_exit = True
        await serving
        await service.client.close()
        service.close()
