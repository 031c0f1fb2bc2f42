"""Many requests with cancels leave no resources in use, and the metrics have the series of vLLM's dashboards."""

from __future__ import annotations

import gc
import json
import re
import time
from pathlib import Path

import pytest
from servers import ScriptedChannel, TestServer, running
from soak import run, soak

from sageLLM.runtime.server.http_client import Address


def test_requests_and_cancels_leave_no_resources_in_use(server: TestServer) -> None:
    """10^4 requests, of which 3 % have longer answers, several answers or stop strings."""
    address, num_requests = Address.of(server.url), 10_000
    run(soak(address, 200, cancel=0.3, concurrency=48, seed=1, short=0.5))  # fills caches
    gc.collect()  # the client's event loop, which has sockets
    idle = dict.fromkeys(in_use(server), 0) | {name: in_use(server)[name] for name in ("tasks", "files")}
    resident = resident_mib()
    ends = run(soak(address, num_requests, cancel=0.3, concurrency=48, seed=2, short=0.97))
    assert ends.keys() == {"complete", "cancelled"} and ends.total() == num_requests
    assert 0.25 * num_requests < ends["cancelled"] < 0.35 * num_requests
    gc.collect()
    deadline = time.monotonic() + 30
    while any(number > idle[name] for name, number in in_use(server).items()):
        assert time.monotonic() < deadline, (in_use(server), idle)
        time.sleep(0.01)
    assert resident_mib() < resident + 30


def in_use(server: TestServer) -> dict[str, int]:
    """Requests, KV blocks, tasks of the server and file descriptors of this process."""
    service = server.service
    return {
        "requests": service.num_active + service.client.num_requests,
        "queued requests": service.admission.num_requests,
        "queued tokens": service.admission.num_tokens,
        "KV blocks": used_blocks(server),
        "tasks": server.num_tasks(),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


def resident_mib() -> float:
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def used_blocks(server: TestServer) -> int:
    load = server.service.client.load
    return 0 if load is None else load.kv_blocks_used


SERIES = json.loads(Path(__file__).with_name("golden").joinpath("vllm_series.json").read_text(encoding="utf-8"))
"""The series of vLLM 0.32.0 for a text model without further options: labels, and their values where they are fixed."""


def test_expressions_of_vllm_dashboards_find_their_series(server: TestServer) -> None:
    """The boards in vLLM's examples/observability read series that vLLM's server has; ours has all of them."""
    with running(ScriptedChannel, metrics_namespace="vllm") as other:
        other.get("/v1/models")
        page = other.get("/metrics").text
    found: dict[str, list[dict[str, str]]] = {}
    for line in page.splitlines():
        if match := re.match(r"((?:vllm:)?\w+)(?:\{(.*)\})? ", line):
            found.setdefault(match[1], []).append(dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")))
    for name, labels in SERIES.items():
        assert name in found, name
        for label, values in labels.items():
            assert all(label in one for one in found[name]), (name, label)
            assert set(values) <= {one[label] for one in found[name]}, (name, label)


def test_counters_of_tokens_agree(server: TestServer) -> None:
    """The sums of the histograms are those of the counters, whatever ran before."""
    server.post("/v1/completions", {"prompt": "def main(", "max_tokens": 3, "n": 2, "temperature": 1})
    page = server.get("/metrics").text

    def value(name: str, **labels: str) -> float:
        found = re.findall(rf"^sagellm:{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE)
        return sum(float(x) for text, x in found if all(f'{k}="{v}"' in text for k, v in labels.items()))

    assert value("prompt_tokens_total") == value("prompt_tokens_by_source_total")
    assert value("prompt_tokens_cached_total") == value("prompt_tokens_cached_by_source_total", source="device")
    assert value("request_prefill_kv_computed_tokens_sum") == value(
        "prompt_tokens_by_source_total", source="local_compute"
    )
    assert value("request_params_n_sum") >= 2 and value("engine_sleep_state", sleep_state="awake") == 1
    assert value("iteration_tokens_total_sum") == pytest.approx(value("phase_tokens_total"))
