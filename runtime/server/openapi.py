"""The OpenAPI document, made from the types of the bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from sageLLM import __version__
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
)

POSTS: dict[str, tuple[type, str]] = {
    "/v1/completions": (CompletionBody, "Complete prompts."),
    "/v1/chat/completions": (ChatBody, "Answer a conversation."),
    "/v1/responses": (ResponsesBody, "Answer a conversation, in the form of the Responses API."),
    "/v1/messages": (MessagesBody, "Answer a conversation, in the form of Anthropic's API."),
    "/v1/messages/count_tokens": (CountTokensBody, "The number of tokens of a conversation."),
    "/v1/embeddings": (EmbeddingBody, "Embed texts."),
    "/tokenize": (TokenizeBody, "Token ids of a text or a conversation."),
    "/detokenize": (DetokenizeBody, "Text of token ids."),
    "/v1/workers/{number}/role": (RoleBody, "Let a prefill or decode worker take another role; for operators."),
}
GETS = {
    "/v1/models": "The served models.",
    "/v1/models/{name}": "One model.",
    "/metrics": "Prometheus metrics.",
    "/version": "The version.",
    "/livez": "Whether the process answers.",
    "/readyz": "Whether requests are accepted.",
    "/health": "Whether the engine is alive.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


def openapi(model_names: Sequence[str]) -> dict[str, Any]:
    schemas, components = msgspec.json.schema_components(
        [kind for kind, _ in POSTS.values()], ref_template="#/components/schemas/{name}"
    )
    failures = {"default": {"description": "An error.", "content": _json({"$ref": "#/components/schemas/Error"})}}
    paths: dict[str, Any] = {}
    for (path, (_, summary)), schema in zip(POSTS.items(), schemas, strict=True):
        answer = {"200": {"description": "The answer; an event stream with `stream`."}}
        body = {"required": True, "content": _json(schema)}
        post = {"summary": summary, "requestBody": body, "responses": answer | failures}
        paths[path] = {"post": post | _parameters(path)}
    for path, summary in GETS.items():
        get = {"summary": summary, "responses": {"200": {"description": summary}} | failures}
        paths[path] = {"get": get | _parameters(path)}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"sageLLM: {', '.join(model_names)}", "version": __version__},
        "paths": paths,
        "components": {"schemas": {**components, "Error": ERROR}},
    }


def _parameters(path: str) -> dict[str, Any]:
    """The parameters that are parts of the path; `number` is an integer, and others are texts."""
    names = re.findall(r"{(\w+)}", path)
    kinds = {name: "integer" if name == "number" else "string" for name in names}
    found = [{"name": name, "in": "path", "required": True, "schema": {"type": kinds[name]}} for name in names]
    return {"parameters": found} if found else {}


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
