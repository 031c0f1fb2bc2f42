"""The routes of the server, their errors, and the queue in front of the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sageLLM import __version__
from sageLLM.runtime.server import anthropic, chat, completions, embeddings, responses, tokens, workers
from sageLLM.runtime.server.admission import Ticket
from sageLLM.runtime.server.bodies import (
    ChatBody,
    CompletionBody,
    CountTokensBody,
    DetokenizeBody,
    EmbeddingBody,
    MessagesBody,
    ResponsesBody,
    RoleBody,
    TokenizeBody,
    decode_body,
    load_json,
)
from sageLLM.runtime.server.errors import ApiError, as_api_error, encode_error, renamed
from sageLLM.runtime.server.exchange import Buffers, ClientGoneError, Exchange, Message, Receive, Scope, Send
from sageLLM.runtime.server.gate import Gate, request_id_of
from sageLLM.runtime.server.openapi import openapi
from sageLLM.runtime.server.pages import page_routes
from sageLLM.runtime.server.service import Service

LOG = logging.getLogger("sagellm")
NUM_BODIES = 16
"""Bodies of the largest size that may be received at the same time."""

NAMES: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": {"prompt": "messages"},
    "/v1/responses": {
        "prompt": "input",
        "messages": "input",
        "response_format": "text",
        "max_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning",
    },
    "/v1/messages": {"prompt": "messages", "response_format": "output_config", "stop": "stop_sequences"},
    "/v1/messages/count_tokens": {"prompt": "messages"},
    "/v1/embeddings": {"prompt": "input"},
}
"""The names of fields in a route's body, by those of completions and chats."""

B = TypeVar("B")
Generate = Callable[[Service, Exchange, B, Ticket], Awaitable[None]]
Answer = Callable[[Service, Exchange, B], Awaitable[None]]
Simple = Callable[[Exchange], Awaitable[None]]


class Endpoint:
    """An ASGI application for one route: runs the handler, and turns its exceptions into error objects.

    Handlers share code, so `names` has the route's names of fields that have another one there.
    """

    def __init__(self, service: Service, handle: Simple, names: Mapping[str, str]) -> None:
        self._service, self._handle, self._names = service, handle, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._handle(exchange)
        except ClientGoneError:
            scope["state"]["is_gone"] = True
        except asyncio.CancelledError:
            raise
        except Exception as error:
            api_error = renamed(as_api_error(error), self._names)
            if api_error.status == 500:
                known = isinstance(error, ApiError | RuntimeError)
                LOG.error("request %s failed", exchange.request_id, exc_info=None if known else error)
            if api_error.reason is not None:
                self._service.metrics.count_refusal(api_error.reason)
            await exchange.respond_error(api_error)
        finally:
            exchange.close()


class Router:
    """The handlers of a service, by route."""

    def __init__(self, service: Service) -> None:
        self.service, self.settings = service, service.settings
        self._buffers = Buffers(NUM_BODIES * service.settings.max_body_size)
        self.queued = {
            "/v1/completions": self._generation(CompletionBody, completions.complete),
            "/v1/chat/completions": self._generation(ChatBody, chat.chat),
            "/v1/responses": self._generation(ResponsesBody, responses.respond),
            "/v1/messages": self._generation(MessagesBody, anthropic.create),
            "/v1/embeddings": self._admitted(EmbeddingBody, embeddings.embed),
        }

    def routes(self) -> list[Route]:
        def post(path: str, handle: Simple) -> Route:
            return Route(path, Endpoint(self.service, handle, NAMES.get(path, {})), methods=["POST"])

        def get(path: str, handle: Simple) -> Route:
            return Route(path, Endpoint(self.service, handle, {}), methods=["GET"])

        return [
            *(post(path, handle) for path, handle in self.queued.items()),
            post("/v1/messages/count_tokens", self._answered(CountTokensBody, anthropic.count_tokens)),
            post("/tokenize", self._answered(TokenizeBody, tokens.tokenize_text)),
            post("/detokenize", self._answered(DetokenizeBody, tokens.detokenize)),
            post("/v1/workers/{number:int}/role", self._answered(RoleBody, workers.set_role)),
            get("/v1/models", self.models),
            get("/v1/models/{name:path}", self.model),
            get("/metrics", self.metrics),
            get("/version", self.version),
            get("/livez", self.livez),
            get("/readyz", self.readyz),
            get("/health", self.health),
            Route("/ping", Endpoint(self.service, self.health, {}), methods=["GET", "POST"]),
            get("/openapi.json", self.openapi),
            *(get(path, handle) for path, handle in page_routes().items()),
        ]

    def _admitted(self, kind: type[B], handle: Generate[B]) -> Simple:
        """A handler of requests for the engine: takes a place in the queue before it reads the body."""

        async def run(exchange: Exchange) -> None:
            self.service.require_engine()
            ticket = self.service.admission.enter()
            self.service.num_active += 1
            try:
                await handle(self.service, exchange, await self._body(exchange, kind), ticket)
            finally:
                self.service.num_active -= 1
                self.service.admission.leave(ticket)

        return run

    def _generation(self, kind: type[B], handle: Generate[B]) -> Simple:
        admitted = self._admitted(kind, handle)

        async def run(exchange: Exchange) -> None:
            self.service.require_engine()
            self.service.require_generation()
            await admitted(exchange)

        return run

    def _answered(self, kind: type[B], handle: Answer[B]) -> Simple:
        async def run(exchange: Exchange) -> None:
            self.service.require_started()
            await handle(self.service, exchange, await self._body(exchange, kind))

        return run

    async def _body(self, exchange: Exchange, kind: type[B]) -> B:
        data = await exchange.read_body(self.settings.max_body_size, self.settings.body_timeout, self._buffers)
        values = load_json(data, self.settings.max_json_depth)
        body, exchange.ignored = decode_body(values, kind, is_lenient=self.settings.lenient)
        return body

    # --- facts about the server ---

    def _card(self, name: str) -> dict[str, Any]:
        self.service.require_started()
        return {
            "id": name,
            "object": "model",
            "created": self.service.created,
            "owned_by": "sagellm",
            "root": self.settings.model,
            "parent": None,
            "max_model_len": self.service.ready.max_model_len,
            "permission": [],
        }

    async def models(self, exchange: Exchange) -> None:
        await exchange.respond_json(
            {"object": "list", "data": [self._card(name) for name in self.settings.model_names]}
        )

    async def model(self, exchange: Exchange) -> None:
        name = exchange.scope["path_params"]["name"]
        if name not in self.settings.model_names:
            raise ApiError(404, f"The model `{name[:200]}` does not exist.", "model")
        await exchange.respond_json(self._card(name))

    async def version(self, exchange: Exchange) -> None:
        await exchange.respond_json({"version": __version__})

    async def metrics(self, exchange: Exchange) -> None:
        metrics, admission = self.service.metrics, self.service.admission
        metrics.queued_requests.set(admission.num_requests)
        metrics.queued_tokens.set(admission.num_tokens)
        page = await asyncio.to_thread(metrics.page)
        await exchange.respond(200, page, "text/plain; version=0.0.4; charset=utf-8")

    async def livez(self, exchange: Exchange) -> None:
        await exchange.respond(200, b"")

    async def readyz(self, exchange: Exchange) -> None:
        if reason := self.service.why_not_ready():
            raise ApiError(503, reason)
        await exchange.respond(200, b"")

    async def health(self, exchange: Exchange) -> None:
        """vLLM's: whether the engine is alive; so it stays 200 while admitted requests finish."""
        self.service.require_engine()
        await exchange.respond(200, b"")

    async def openapi(self, exchange: Exchange) -> None:
        await exchange.respond_json(openapi(self.settings.model_names))


class Outer:
    """The outermost layer of the application: asks the gate, and records the response."""

    def __init__(self, app: Any, service: Service, gate: Gate) -> None:
        self._app, self._service, self.gate = app, service, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, has_id = time.monotonic(), self.gate.settings.enable_request_id_headers
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message.setdefault("headers", [])
                if has_id:
                    headers.append((b"x-request-id", request_id.encode()))
                if self._service.admission.is_draining and all(name != b"connection" for name, _ in headers):
                    headers.append((b"connection", b"close"))
            await send(message)

        try:
            if (error := self.gate.why_refused(scope)) is not None:
                if error.reason is not None:
                    self._service.metrics.count_refusal(error.reason)
                await refuse(send_with_id, error)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            handler = getattr(scope.get("route"), "path", "none")
            self.gate.record(scope, handler, request_id, status or 499, time.monotonic() - start)


async def refuse(send: Send, error: ApiError) -> None:
    body = encode_error(error)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def make_app(service: Service) -> Outer:
    """The ASGI application. CORS is off unless origins are allowed."""
    router = Router(service)
    app: Any = Starlette(routes=router.routes(), exception_handlers={HTTPException: _http_error, Exception: _defect})
    if origins := service.settings.allowed_origins:
        app = CORSMiddleware(app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Outer(app, service, Gate(service, router.queued))


def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the router: 404 and 405."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    texts: Mapping[int, str] = {
        404: f"unknown route {path}",
        405: f"{request.method} is not allowed for {path}",
    }
    headers = dict(error.headers or {})
    return _response(ApiError(error.status_code, texts.get(error.status_code, str(error.detail)), headers=headers))


def _defect(request: Request, error: Exception) -> Response:
    LOG.error("a request failed outside of its handler", exc_info=error)
    return _response(ApiError(500, f"internal error: {type(error).__name__}"))


def _response(error: ApiError) -> Response:
    return Response(encode_error(error), error.status, media_type="application/json", headers=error.headers)
