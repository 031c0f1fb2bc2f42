"""Random bodies, valid and hostile: no 5xx, no hang, always an error object."""

from __future__ import annotations

import json
import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import TestServer

from sageLLM.runtime.server.bodies import IGNORED, REFUSED, ChatBody, CompletionBody, EmbeddingBody, ResponsesBody

SCALE = int(os.environ.get("SAGELLM_SERVER_SCALE", "1"))
numbers = st.one_of(st.integers(-3, 30), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
texts = st.one_of(st.sampled_from(["", "a", "def f(", "\0", "é日本", "float", "base64"]), st.text(max_size=20))
leaves = st.one_of(st.none(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.one_of(st.sampled_from(["user", "system", "tool"]), values), "content": values}),
    max_size=3,
)

KINDS: dict[str, type] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/responses": ResponsesBody,
}


def bodies(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    names = [*kind.__struct_fields__, *sorted(IGNORED), *sorted(REFUSED)]  # type: ignore[attr-defined]
    required = {
        CompletionBody: {"prompt": values},
        ChatBody: {"messages": messages},
        EmbeddingBody: {"input": values},
        ResponsesBody: {"input": st.one_of(texts, messages)},
    }[kind]
    some = st.dictionaries(st.one_of(st.sampled_from(names), texts), values, max_size=4)
    # Short answers keep the test fast; max_tokens may be overwritten by the random fields.
    name = {EmbeddingBody: None, ResponsesBody: "max_output_tokens"}.get(kind, "max_tokens")
    base = {} if name is None else {name: st.just(2)}
    return st.tuples(st.fixed_dictionaries({**base, **required}), some).map(lambda pair: {**pair[0], **pair[1]})


@settings(
    max_examples=20 * SCALE,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(data=st.data())
def test_no_body_is_an_error_of_the_server(server: TestServer, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(KINDS)))
    body = data.draw(bodies(KINDS[path]))
    body.pop("ignore_eos", None)
    response = server.http.post(path, content=json.dumps(body).encode())
    assert response.status_code in (200, 400, 404), (path, body, response.text)
    if response.status_code != 200:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    elif body.get("stream") is True:
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text


@settings(
    max_examples=20 * SCALE,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.binary(max_size=60), path=st.sampled_from(sorted([*KINDS, "/tokenize", "/detokenize"])))
def test_random_bytes(server: TestServer, data: bytes, path: str) -> None:
    assert server.http.post(path, content=data).status_code == 400


def test_the_document_describes_every_route(server: TestServer) -> None:
    document = server.get("/openapi.json").json()
    for path in KINDS:
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = schema["$ref"].rpartition("/")[2]
        assert set(KINDS[path].__struct_fields__) == set(document["components"]["schemas"][name]["properties"])  # type: ignore[attr-defined]
    assert document["paths"].keys() >= {"/v1/models", "/metrics", "/readyz", "/tokenize"}
