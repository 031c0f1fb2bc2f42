"""Spans of requests: phases, attributes, the caller's trace, and requests that are aborted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from servers import NAME, TestServer

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.server.tracing import Tracing, make_tracing

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
Spans = Callable[[], dict[str, ReadableSpan]]


@pytest.fixture
def spans(server: TestServer) -> Iterator[Spans]:
    """The spans so far, by name."""
    exporter = InMemorySpanExporter()
    server.service.tracing = found = Tracing(exporter, NAME)

    def flushed() -> dict[str, ReadableSpan]:
        deadline = time.monotonic() + 10  # a request is recorded after its response
        while not exporter.get_finished_spans() and time.monotonic() < deadline:
            found._provider.force_flush()
        return {span.name: span for span in exporter.get_finished_spans()}

    yield flushed
    server.service.tracing = None
    found.close()


def test_a_request_has_a_span_with_its_phases(server: TestServer, spans: Spans) -> None:
    body = {"prompt": "def main(", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    server.post("/v1/completions", body, headers={"traceparent": f"00-{TRACE}-{CALLER}-01", "x-request-id": "r1"})
    found = spans()
    assert found.keys() == {"llm_request", "queue", "prefill", "decode"}
    request = found.pop("llm_request")
    assert request.context is not None and request.parent is not None
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (TRACE, CALLER)
    values = dict(request.attributes or {})
    assert (values["gen_ai.request.id"], values["gen_ai.request.max_tokens"]) == ("cmpl-r1", 5)
    assert (values["gen_ai.usage.prompt_tokens"], values["gen_ai.usage.completion_tokens"]) == (3, 5)
    assert values["gen_ai.response.finish_reasons"] == ("length",)
    phases = [found["queue"], found["prefill"], found["decode"]]
    for span in phases:
        assert span.parent is not None and span.parent.span_id == request.context.span_id
    edges = [edge for span in phases for edge in (span.start_time or 0, span.end_time or 0)]
    tolerance = 5_000_000  # ns, as each edge is converted by two readings of clocks
    assert all(first - tolerance <= second for first, second in pairwise(edges))
    assert values["gen_ai.latency.time_to_first_token"] <= values["gen_ai.latency.e2e"]


def test_an_endpoint_requires_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_tracing(None, NAME) is None
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SageError, match="otlp_traces_endpoint requires the extra tracing"):
        make_tracing("http://127.0.0.1:4318/v1/traces", NAME)
