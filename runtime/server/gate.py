"""The checks of every request before its route (headers, API key), and its record in logs and metrics."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection

from sageLLM.runtime.server.errors import ApiError, encode_response
from sageLLM.runtime.server.exchange import Scope, error_kind, header_of
from sageLLM.runtime.server.service import Service

ACCESS = logging.getLogger("sagellm.access")
REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
QUIET = ("/livez", "/readyz", "/health", "/ping", "/metrics")
"""Paths of probes; their successful requests are logged at level DEBUG."""
PROTECTED = ("/v1/", "/v2/", "/inference/")


class Gate:
    """`queued_paths` are the routes with requests that take a place in the queue."""

    def __init__(self, service: Service, queued_paths: Collection[str]) -> None:
        self._service, self.settings = service, service.settings
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.settings.api_key]
        self._queued_paths = frozenset(queued_paths)

    def refuse_early(self, scope: Scope) -> bytes | None:
        """The response to a request that finds the queue full, before it costs a task, a route or its body."""
        if scope["path"] not in self._queued_paths or scope["method"] != "POST":
            return None
        if self._service.why_not_ready() or (error := self._service.admission.why_full()) is None:
            return None
        start = time.monotonic()
        if self.why_refused(scope) is not None:
            return None
        request_id = request_id_of(scope)
        if self.settings.enable_request_id_headers:
            error.headers["X-Request-Id"] = request_id
        self._service.metrics.count_refusal(error.reason or "")
        response = encode_response(error, error_kind(scope))
        self.record(scope, scope["path"], request_id, error.status, time.monotonic() - start)
        return response

    def why_refused(self, scope: Scope) -> ApiError | None:
        """The error of a request that no route may see."""
        pairs, limit = scope["headers"], self.settings.max_header_count
        if len(pairs) > limit:
            return ApiError(431, f"a request must have at most {limit} headers, got {len(pairs)}")
        if sum(len(name) + len(value) for name, value in pairs) > self.settings.max_header_size:
            return self.too_long()
        if not self._is_allowed(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            return ApiError(401, "the API key is missing or wrong", headers=headers, reason="auth")
        return None

    def too_long(self) -> ApiError:
        return ApiError(431, f"the headers must have at most {self.settings.max_header_size} bytes")

    def record(self, scope: Scope, handler: str, request_id: str, status: int, seconds: float) -> None:
        """Counts and logs a response; `handler` is its route."""
        method, path = scope["method"], scope["path"]
        self._service.metrics.count_http(handler, method if method in METHODS else "other", status, seconds)
        level = logging.DEBUG if handler in QUIET and status < 400 else logging.INFO
        if not self.settings.access_log or not ACCESS.isEnabledFor(level):
            return
        extra = {
            "request_id": request_id,
            "method": method,
            "path": path,
            "status": status,
            "seconds": round(seconds, 6),
            "client": (scope.get("client") or ["-"])[0],
        }
        ACCESS.log(level, "%s %s %d %.1f ms", method, path, status, 1e3 * seconds, extra=extra)

    def _is_allowed(self, scope: Scope) -> bool:
        """Whether the path is open or the key right; every key is compared, in constant time."""
        if not self._keys or scope["method"] == "OPTIONS" or not f"{scope['path']}/".startswith(PROTECTED):
            return True
        kind, _, token = (header_of(scope, b"authorization") or "").partition(" ")
        if key := header_of(scope, b"x-api-key"):  # Anthropic's header
            kind, token = "bearer", key
        digest = hashlib.sha256(token.encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        return any(matches) and kind.lower() == "bearer"


METHODS = ("GET", "POST", "OPTIONS", "HEAD")


def request_id_of(scope: Scope) -> str:
    """The client's id of a request, or a new one."""
    given = header_of(scope, b"x-request-id")
    return given if given and REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
