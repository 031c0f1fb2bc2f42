"""Random bodies, valid and hostile: no 5xx, no hang, always an error object; and a document of all bodies."""

from __future__ import annotations

import asyncio

from random_requests import KINDS, fuzz
from servers import TestServer

from sageLLM.runtime.server.http_client import Address


def test_no_body_is_an_error_of_the_server(server: TestServer) -> None:
    ends = asyncio.run(fuzz(Address.of(server.url), range(1000), 16))
    assert ends.total() == 1000 and {f"{path} {status}" for path in KINDS for status in (200, 400)} <= ends.keys()


def test_the_document_describes_every_route(server: TestServer) -> None:
    document = server.get("/openapi.json").json()
    for path in KINDS:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = schema["$ref"].rpartition("/")[2]
        assert set(KINDS[path].__struct_fields__) == set(document["components"]["schemas"][name]["properties"])  # type: ignore[attr-defined]
    assert document["paths"].keys() >= {"/v1/models", "/metrics", "/readyz", "/tokenize"}
