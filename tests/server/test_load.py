"""Many requests with cancels leave no resources in use, and the metrics have the series of vLLM's dashboards."""

from __future__ import annotations

import asyncio
import time

from servers import ScriptedChannel, TestServer, running
from soak import soak

from sageLLM.runtime.server.http_client import Address


def test_requests_and_cancels_leave_no_resources_in_use(server: TestServer) -> None:
    ends = asyncio.run(soak(Address.of(server.url), 100, cancel=0.3, concurrency=16, seed=1))
    assert ends.keys() <= {"complete", "cancelled"} and ends.total() == 100 and ends["complete"]
    service, deadline = server.service, time.monotonic() + 30
    while service.num_active or service.client.num_requests or used_blocks(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (service.admission.num_requests, service.admission.num_tokens) == (0, 0)


def used_blocks(server: TestServer) -> int:
    load = server.service.client.load
    return 0 if load is None else load.kv_blocks_used


BOARD = [
    "e2e_request_latency_seconds_bucket",
    "e2e_request_latency_seconds_sum",
    "e2e_request_latency_seconds_count",
    "prompt_tokens_total",
    "generation_tokens_total",
    "inter_token_latency_seconds_bucket",
    "inter_token_latency_seconds_sum",
    "inter_token_latency_seconds_count",
    "num_requests_running",
    "num_requests_waiting",
    "time_to_first_token_seconds_bucket",
    "time_to_first_token_seconds_sum",
    "time_to_first_token_seconds_count",
    "kv_cache_usage_perc",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_success_total",
    "request_queue_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_max_num_generation_tokens_sum",
    "num_requests_waiting_by_reason",
    "num_preemptions_total",
    "prompt_tokens_by_source_total",
    "admission_rejections_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
]
"""The series of the dashboards in vLLM's examples/observability."""


def test_series_of_vllm_dashboards() -> None:
    with running(ScriptedChannel, metrics_namespace="vllm") as server:
        server.get("/v1/models")
        page = server.get("/metrics").text
    for name in BOARD:
        lines = [line for line in page.splitlines() if line.startswith(f"vllm:{name}{{")]
        assert lines and all('model_name="tiny"' in line and 'engine="0"' in line for line in lines), name
    assert 'http_requests_total{handler="/v1/models",method="GET",status="2xx"}' in page
