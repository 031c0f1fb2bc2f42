"""OpenTelemetry spans of requests: one per request, with children for the queue, the prefill and the decode phase.

Names of attributes are vLLM's. A `traceparent` header makes the request's span a child of the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sageLLM import __version__
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.sampling.sampling_params import SamplingParams

INSTALL = "pip install 'sagellm[tracing]'"


@dataclass(slots=True)
class RequestTimes:
    """The course of a request. Times are those of `time.monotonic`; `first` is None for one without a token."""

    request_id: str
    params: SamplingParams
    num_prompt_tokens: int
    arrival: float
    queue_seconds: float = 0.0
    first: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reasons: Sequence[str] = field(default_factory=list)


class Tracing:
    """Sends spans in the background; `close` sends the last ones."""

    def __init__(self, exporter: Any, model_name: str) -> None:
        """`exporter` is an OpenTelemetry SpanExporter."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._model_name = model_name
        self._provider = TracerProvider(resource=Resource.create({"service.name": "sagellm"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("sagellm", __version__)

    def record(self, times: RequestTimes, headers: Mapping[str, str]) -> None:
        """Records a request that ends now."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end = time.monotonic()
        context = TraceContextTextMapPropagator().extract(headers)
        span = self._tracer.start_span(
            "llm_request",
            context,
            SpanKind.SERVER,
            self._attributes(times, end),
            start_time=_wall(times.arrival),
        )
        inside = set_span_in_context(span)
        for name, start, stop in _phases(times, end):
            child = self._tracer.start_span(name, inside, start_time=_wall(start))
            child.end(_wall(stop))
        span.end(_wall(end))

    def close(self) -> None:
        self._provider.shutdown()

    def _attributes(self, times: RequestTimes, end: float) -> dict[str, Any]:
        params, first = times.params, times.first
        found: dict[str, Any] = {
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": times.request_id,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.n": params.n,
            "gen_ai.usage.prompt_tokens": times.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": times.num_tokens,
            "gen_ai.usage.cached_tokens": times.num_cached_tokens,
            "gen_ai.latency.time_in_queue": times.queue_seconds,
            "gen_ai.latency.e2e": end - times.arrival,
            "gen_ai.response.finish_reasons": list(times.finish_reasons),
        }
        if params.max_tokens is not None:
            found["gen_ai.request.max_tokens"] = params.max_tokens
        if first is not None:
            found["gen_ai.latency.time_to_first_token"] = first - times.arrival
        return found


def _phases(times: RequestTimes, end: float) -> list[tuple[str, float, float]]:
    """The phases with their begin and end; one that is cut ends with the request."""
    if times.first is None:
        return [("queue", times.arrival, end)]
    scheduled = min(times.arrival + times.queue_seconds, times.first)
    return [
        ("queue", times.arrival, scheduled),
        ("prefill", scheduled, times.first),
        ("decode", times.first, end),
    ]


def _wall(monotonic: float) -> int:
    """Nanoseconds since the epoch."""
    return time.time_ns() + round(1e9 * (monotonic - time.monotonic()))


def make_tracing(endpoint: str | None, model_name: str) -> Tracing | None:
    """Tracing to an OTLP collector over HTTP; None without an endpoint. Raises SageError without the packages."""
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise SageError(f"otlp_traces_endpoint requires the extra tracing; run {INSTALL}") from None
    return Tracing(OTLPSpanExporter(endpoint=endpoint), model_name)
