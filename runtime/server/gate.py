"""The checks of every request before its route (headers, API key), and its record in logs and metrics."""

from __future__ import annotations

import hashlib
import hmac
import logging
import random
import re
import time
from collections.abc import Collection

from sageLLM.runtime.server.errors import ApiError, encode_response
from sageLLM.runtime.server.exchange import Scope, error_kind, header_of
from sageLLM.runtime.server.service import Service

ACCESS = logging.getLogger("sagellm.access")
REQUEST_ID = re.compile(r"[\w.:-]{1,128}")
QUIET = ("/livez", "/readyz", "/health", "/ping", "/metrics")
"""Paths of probes; their successful requests are logged at level DEBUG."""
ID_PLACE = "(request id)"
MAX_CACHED = 64
"""Encoded refusals; they differ in the numbers that they name."""
PROTECTED = ("/v1/", "/v2/", "/inference/")
ADMIN = "/v1/workers/"
"""Requests of the operator."""


class Gate:
    """`queued_paths` are the routes with requests that take a place in the queue."""

    def __init__(self, service: Service, queued_paths: Collection[str]) -> None:
        self._service, self.settings = service, service.settings
        self._keys = [_digest(key.encode()) for key in service.settings.api_key]
        self._admin_keys = [_digest(key.encode()) for key in service.settings.admin_api_key]
        self._queued_urls = {path.encode(): path for path in queued_paths}
        self._refusals: dict[tuple[int, int, str | None], tuple[bytes, bytes]] = {}

    def refuse_early(self, scope: Scope, url: bytes) -> bytes | None:
        """The response to a POST that finds the queue full, before it costs a task, a route or its body.

        `scope` has the headers and the client's address.
        """
        if not self._service.admission.is_full or self._service.why_not_ready():
            return None
        if (path := self._queued_urls.get(url)) is None:
            return None
        scope.update(method="POST", path=path)
        start = time.monotonic()
        if self.why_refused(scope) is not None:
            return None
        request_id = request_id_of(scope)
        before, after = self._full_response(error_kind(scope))
        response = before + request_id.encode() + after if self.settings.enable_request_id_headers else before
        self._service.metrics.count_refusal("requests")
        self.record(scope, path, request_id, 429, time.monotonic() - start)
        return response

    def _full_response(self, kind: str | None) -> tuple[bytes, bytes]:
        """The response of a full queue before and after the request's id."""
        admission = self._service.admission
        key = admission.num_requests, admission.retry_after, kind
        if key not in self._refusals:
            error = admission.refusal_of_full()
            if self.settings.enable_request_id_headers:
                error.headers["X-Request-Id"] = ID_PLACE
            before, _, after = encode_response(error, kind).partition(ID_PLACE.encode())
            if len(self._refusals) == MAX_CACHED:
                self._refusals.clear()
            self._refusals[key] = before, after
        return self._refusals[key]

    def why_refused(self, scope: Scope) -> ApiError | None:
        """The error of a request that no route may see."""
        pairs, limit = scope["headers"], self.settings.max_header_count
        if len(pairs) > limit:
            return ApiError(431, f"a request must have at most {limit} headers, got {len(pairs)}")
        if sum(len(name) + len(value) for name, value in pairs) > self.settings.max_header_size:
            return self.too_long()
        keys, is_admin = self._keys_of(scope)
        if is_admin and self._keys and not keys:
            return ApiError(403, "this needs an administrator's key; start the server with --admin-api-key")
        if keys and not self._has_key(scope, keys):
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

    def _keys_of(self, scope: Scope) -> tuple[list[bytes], bool]:
        """The digests of the keys of a path, none of which is needed if there are none; whether it is an operator's."""
        path = f"{scope['path']}/"
        if scope["method"] == "OPTIONS" or not path.startswith(PROTECTED):
            return [], False
        is_admin = path.startswith(ADMIN)
        return self._admin_keys if is_admin else self._keys, is_admin

    @staticmethod
    def _has_key(scope: Scope, keys: list[bytes]) -> bool:
        """Whether the request has one of the keys; all are compared, in constant time."""
        kind, _, token = (header_of(scope, b"authorization") or "").partition(" ")
        if key := header_of(scope, b"x-api-key"):  # Anthropic's header
            kind, token = "bearer", key
        digest = _digest(token.encode("latin-1", "replace"))
        matches = [hmac.compare_digest(digest, key) for key in keys]
        return any(matches) and kind.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


METHODS = ("GET", "POST", "OPTIONS", "HEAD")
DRAW = random.Random()  # seeded by the system; ids have to be unique, not secret


def request_id_of(scope: Scope) -> str:
    """The client's id of a request, or a new one."""
    given = header_of(scope, b"x-request-id")
    return given if given and REQUEST_ID.fullmatch(given) else f"{DRAW.getrandbits(128):032x}"
