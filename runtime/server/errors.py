"""Errors of the HTTP interface: always `{"error": {message, type, param, code}}`, as in OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec

from sageLLM.runtime.errors import EngineError, RequestError, SageError, TokenizerError

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "TooManyRequestsError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """An answer other than 200; `reason` labels refusals in the metrics."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.reason = status, message, param, reason
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, self.param)


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def as_api_error(error: Exception) -> ApiError:
    """The answer for an exception of a handler; a defect of ours becomes 500 without its details."""
    match error:
        case ApiError():
            return error
        case RequestError(param=param):
            return ApiError(400, str(error), param)
        case TokenizerError():  # of the request's text; the checkpoint's files were read at the start
            return ApiError(400, str(error), "prompt")
        case SageError():
            return ApiError(400, str(error))
        case EngineError():
            return ApiError(500, str(error))
        case _:
            return ApiError(500, f"internal error: {type(error).__name__}")


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error with the name that the field has in the request; `names` are those of the request by ours."""
    field = (error.param or "").partition("[")[0].partition(".")[0]
    if (name := names.get(field)) is None:
        return error
    if error.param == field and error.message.startswith(field):
        error.message = name + error.message.removeprefix(field)
    error.param = name
    return error


def encode_error(error: ApiError, kind: str | None = None) -> bytes:
    """The body; with `kind` it has that type, as Anthropic's clients expect."""
    return msgspec.json.encode(error.body() if kind is None else {"type": kind, **error.body()})


def encode_response(error: ApiError, kind: str | None = None) -> bytes:
    """The whole response in HTTP/1.1, for connections without an application."""
    body = encode_error(error, kind)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name.lower()}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body
