"""Spans sent by OTLP over HTTP to a collector, which is a receiver in this process with OpenTelemetry's messages."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.server.tracing import RequestTimes, make_tracing

received: list[ExportTraceServiceRequest] = []


class Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *values: object) -> None:
        pass


server = HTTPServer(("127.0.0.1", 0), Collector)
threading.Thread(target=server.serve_forever, daemon=True).start()
tracing = make_tracing(f"http://127.0.0.1:{server.server_port}/v1/traces", "tiny")
assert tracing is not None
now = time.monotonic()
times = RequestTimes("r1", SamplingParams(max_tokens=5), 3, now - 1, 0.1, now - 0.5, 5, 0, ["length"])
tracing.record(times, {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"})
tracing.close()
spans = [
    span for one in received for group in one.resource_spans for scope in group.scope_spans for span in scope.spans
]
assert {span.name for span in spans} == {"llm_request", "queue", "prefill", "decode"}, spans
assert {span.trace_id.hex() for span in spans} == {"4bf92f3577b34da6a3ce929d0e0e4736"}
