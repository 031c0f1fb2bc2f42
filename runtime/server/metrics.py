"""Prometheus metrics of the server, with the suffixes and labels of vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from sageLLM.runtime.server.messages import Load, Ready
from sageLLM.runtime.server.plain_metrics import Count, Distribution, PlainCounter, PlainHistogram

REFUSALS = ("requests", "tokens", "draining", "not_ready", "auth", "body")

GAUGES = {
    "num_requests_running": "Requests with KV.",
    "num_requests_waiting": "Requests without KV.",
    "kv_cache_usage_perc": "Share of the KV blocks in use, from 0 to 1.",
    "num_requests_queued": "Admitted requests without a first token.",
    "num_tokens_queued": "Prompt tokens of these requests.",
}
GAUGES_BY = {
    "num_requests_waiting_by_reason": (
        "Requests without KV, by reason.",
        "reason",
        ("capacity", "preempted", "deferred"),
    ),
    "kv_blocks": ("KV blocks by state.", "state", ("used", "cached", "free")),
    "pd_mode": (
        "1 for the mode of the prefill/decode scheduler.",
        "mode",
        ("strict", "time_share", "hybrid", "auto"),
    ),
    "engine_sleep_state": (
        "1 for the state of the engine, which never sleeps.",
        "sleep_state",
        ("awake", "weights_offloaded", "discard_all"),
    ),
}
"""Text, label and its values."""
COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests with a first token.",
    "num_preemptions": "Requests that lost their KV.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "kv_transfers": "Requests with KV copied between the pools of strict mode.",
    "engine_restarts": "Starts of the engine after it was lost.",
    "prompt_tokens_cached": "Prompt tokens found in the prefix cache.",
    # Always 0, for boards that divide by them.
    "external_prefix_cache_queries": "Prompt tokens looked up in a cache outside of the engine, which has none.",
    "external_prefix_cache_hits": "Prompt tokens found there.",
    "mm_cache_queries": "Images looked up; only texts are served.",
    "mm_cache_hits": "Images found.",
    "estimated_flops_per_gpu": "Not estimated, as by vLLM without its option for it.",
    "estimated_read_bytes_per_gpu": "Not estimated.",
    "estimated_write_bytes_per_gpu": "Not estimated.",
}
COUNTERS_BY = {
    "phase_tokens": ("Tokens that steps have computed, by phase.", "phase", ("prefill", "decode")),
    "prompt_tokens_by_source": (
        "Prompt tokens by their source.",
        "source",
        ("local_compute", "local_cache_hit", "external_kv_transfer"),
    ),
    "prompt_tokens_cached_by_source": (
        "These tokens by the tier of their KV.",
        "source",
        ("device", "host", "p2p", "disk", "external_unspecified"),
    ),
    "request_success": (
        "Answers that have ended, by reason.",
        "finished_reason",
        ("stop", "length", "abort", "error", "repetition"),
    ),
}

# vLLM's buckets
TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
ITL = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
MAX_BUCKET = 10**6


def token_buckets(longest: int) -> list[int]:
    """1, 2, 5, 10, ... up to `longest`."""
    buckets: list[int] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale > longest:
                return buckets
            buckets.append(digit * scale)
        scale *= 10


TOKENS = token_buckets(MAX_BUCKET)
HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Time to the first token.", TTFT),
    "request_time_per_output_token_seconds": ("Mean time per token after the first, per answer.", ITL),
    "e2e_request_latency_seconds": ("Time to the end of an answer.", LATENCY),
    "request_queue_time_seconds": ("Time until the first step.", LATENCY),
    "request_prefill_time_seconds": ("First step to first token.", LATENCY),
    "request_decode_time_seconds": ("First token to the end.", LATENCY),
    "request_inference_time_seconds": ("First step to the end.", LATENCY),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", TOKENS),
    "request_max_num_generation_tokens": ("Largest max_tokens asked for.", TOKENS),
    "request_params_max_tokens": ("max_tokens of a request.", TOKENS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens that were not cached.", TOKENS),
    "request_params_n": ("n of a request.", (1, 2, 5, 10, 20)),
    "request_num_preemptions": ("Times that an answer lost its KV.", (0, 1, 2, 3, 5, 10, 20)),
    "iteration_tokens_total": ("Tokens of a step: the mean of the steps between two reports.", STEP_TOKENS),
}

NO_LOAD = msgspec.convert([0] * (len(Load.__struct_fields__) - 1), Load)
"""The counters of an engine that has just started."""

M = TypeVar("M", Gauge, Counter)


class Metrics:
    """All series of one server, under `namespace:`; labelled with the model's name and the engine."""

    def __init__(self, namespace: str, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._namespace, self._values = namespace, {"model_name": model_name, "engine": "0"}
        self._previous: Load | None = None
        self._gauges = {name: self._gauge(name, text) for name, text in GAUGES.items()}
        self._gauges_by = {name: self._of_values(self._gauge, name, *entry) for name, entry in GAUGES_BY.items()}
        self._counters = {name: self._counter(name, text) for name, text in COUNTERS.items()}
        self._counters_by = {name: self._of_values(self._counter, name, *entry) for name, entry in COUNTERS_BY.items()}
        self._histograms = {name: self._histogram(name, *entry) for name, entry in HISTOGRAMS.items()}
        for state, gauge in self._gauges_by["engine_sleep_state"].items():
            gauge.set(state == "awake")
        workers = "Requests of each prefill and decode worker; its epoch counts its starts."
        self._workers = self._gauge("pd_worker_requests", workers, "worker", "role", "state", "epoch")
        self._add_plain()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.queued_requests = self._gauges["num_requests_queued"]
        self.queued_tokens = self._gauges["num_tokens_queued"]
        self.time_to_first_token = self._histograms["time_to_first_token_seconds"]

    def _add_plain(self) -> None:
        """Those of the hot paths: of every token, and of every refusal."""
        prefix, labels = f"{self._namespace}:", [*self._values]
        tokens = PlainCounter(f"{prefix}generation_tokens", "Generated tokens.", labels, self.registry)
        self.generation_tokens = tokens.labels(self._values)
        gaps = f"{prefix}inter_token_latency_seconds"
        gaps_by = PlainHistogram(gaps, "Time between tokens.", labels, self.registry, ITL)
        self.inter_token_latency = gaps_by.labels(self._values)
        refused = f"{prefix}admission_rejections"
        refused_by = PlainCounter(refused, "Refused requests, by reason.", [*labels, "reason"], self.registry)
        self._refusals = {reason: refused_by.labels(self._values | {"reason": reason}) for reason in REFUSALS}
        # The name and the labels are those of prometheus-fastapi-instrumentator, which vLLM's boards read.
        names, seconds = ["handler", "method", "status"], "http_request_duration_seconds"
        bounds = Histogram.DEFAULT_BUCKETS[:-1]
        self.http_requests = PlainCounter("http_requests", "HTTP responses.", names, self.registry)
        self.http_seconds = PlainHistogram(seconds, "Time of HTTP requests.", names[:2], self.registry, bounds)
        self._http: dict[tuple[str, str, int], tuple[Count, Distribution]] = {}

    def _of_values(
        self, make: Callable[..., M], name: str, text: str, label: str, values: Sequence[str]
    ) -> dict[str, M]:
        """The series of each value of a label."""
        metric: Any = make(name, text, label)
        return {value: metric.labels(**self._values, **{label: value}) for value in values}

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        metric = Gauge(f"{self._namespace}:{name}", help, [*self._values, *labels], registry=self.registry)
        return metric if labels else metric.labels(**self._values)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        metric = Counter(f"{self._namespace}:{name}", help, [*self._values, *labels], registry=self.registry)
        return metric if labels else metric.labels(**self._values)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        full = f"{self._namespace}:{name}"
        return Histogram(full, help, list(self._values), registry=self.registry, buckets=buckets).labels(**self._values)

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def describe_engine(self, ready: Ready) -> None:
        for name, gauge in self._gauges_by["pd_mode"].items():
            gauge.set(name == ready.mode)
        self._gauges_by["kv_blocks"]["free"].set(ready.num_kv_blocks)
        info = {
            "block_size": ready.block_size,
            "num_gpu_blocks": ready.num_kv_blocks,
            "max_model_len": ready.max_model_len,
        }
        labels = {name: str(value) for name, value in info.items()}
        name = f"{self._namespace}:cache_config_info"
        config = Gauge(name, "The configuration of the KV cache.", ["engine", *labels], registry=self.registry)
        config.labels(engine="0", **labels).set(1)

    def update_load(self, load: Load) -> None:
        """Sets gauges, and adds the growth of the engine's counters; after a restart they begin at 0 again."""
        gauges, counters = self._gauges, self._counters
        waiting, blocks = self._gauges_by["num_requests_waiting_by_reason"], self._gauges_by["kv_blocks"]
        gauges["num_requests_running"].set(load.num_running)
        gauges["num_requests_waiting"].set(load.num_waiting)
        waiting["preempted"].set(load.num_preempted)
        waiting["capacity"].set(load.num_waiting - load.num_preempted)
        total = load.kv_blocks_total
        gauges["kv_cache_usage_perc"].set(load.kv_blocks_used / total if total else 0)
        blocks["used"].set(load.kv_blocks_used)
        blocks["cached"].set(load.kv_blocks_cached)
        blocks["free"].set(total - load.kv_blocks_used - load.kv_blocks_cached)
        before = self._previous
        if before is None or before.num_steps > load.num_steps:
            before = NO_LOAD
        self._previous = load
        counters["num_preemptions"].inc(load.num_preemptions - before.num_preemptions)
        counters["prefix_cache_queries"].inc(load.prefix_cache_queries - before.prefix_cache_queries)
        counters["prefix_cache_hits"].inc(load.prefix_cache_hits - before.prefix_cache_hits)
        counters["kv_transfers"].inc(load.transfers - before.transfers)
        num_prefill = load.num_prefill_tokens - before.num_prefill_tokens
        num_decode = load.num_decode_tokens - before.num_decode_tokens
        self._counters_by["phase_tokens"]["prefill"].inc(num_prefill)
        self._counters_by["phase_tokens"]["decode"].inc(num_decode)
        for _ in range(num_steps := load.num_steps - before.num_steps):
            self._histograms["iteration_tokens_total"].observe((num_prefill + num_decode) / num_steps)
        self._workers.clear()
        for worker in load.workers:
            labels = {"worker": str(worker.number), "role": worker.role, "state": worker.state}
            self._workers.labels(**self._values, **labels, epoch=str(worker.epoch)).set(worker.num_requests)

    def lose_engine(self) -> None:
        """The engine has ended, and its requests and counters with it."""
        self._previous = None
        for gauge in (
            self._gauges["num_requests_running"],
            self._gauges["num_requests_waiting"],
            self._gauges["kv_cache_usage_perc"],
            *self._gauges_by["num_requests_waiting_by_reason"].values(),
        ):
            gauge.set(0)
        self._counters["engine_restarts"].inc()

    def count_prompt(self, num_tokens: int, num_cached: int, num_answers: int) -> None:
        self._histograms["request_params_n"].observe(num_answers)
        self._histograms["request_prefill_kv_computed_tokens"].observe(num_tokens - num_cached)
        self._counters["prompt_tokens_cached"].inc(num_cached)
        self._counters_by["prompt_tokens_cached_by_source"]["device"].inc(num_cached)
        self._counters["prompt_tokens"].inc(num_tokens)
        self._counters_by["prompt_tokens_by_source"]["local_compute"].inc(num_tokens - num_cached)
        self._counters_by["prompt_tokens_by_source"]["local_cache_hit"].inc(num_cached)

    def count_end(self, reason: str) -> None:
        self._counters_by["request_success"][reason].inc()

    def count_refusal(self, reason: str) -> None:
        self._refusals[reason].inc()

    def count_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        key = handler, method, status // 100
        if key not in self._http:
            labels = {"handler": handler, "method": method, "status": f"{status // 100}xx"}
            self._http[key] = self.http_requests.labels(labels), self.http_seconds.labels(labels)
        counter, histogram = self._http[key]
        counter.inc()
        histogram.observe(seconds)

    def observe_end(
        self,
        reason: str,
        num_prompt: int,
        num_tokens: int,
        max_tokens: int | None,
        *,
        arrival: float,
        first: float,
        end: float,
        queue_seconds: float,
        num_preemptions: int,
    ) -> None:
        """Observes one answer that has ended; times are those of the monotonic clock."""
        self.count_end(reason)
        self._histograms["request_num_preemptions"].observe(num_preemptions)
        self._histograms["request_prompt_tokens"].observe(num_prompt)
        self._histograms["request_generation_tokens"].observe(num_tokens)
        self._histograms["request_max_num_generation_tokens"].observe(max_tokens or num_tokens)
        if max_tokens is not None:
            self._histograms["request_params_max_tokens"].observe(max_tokens)
        self._histograms["e2e_request_latency_seconds"].observe(end - arrival)
        self._histograms["request_queue_time_seconds"].observe(queue_seconds)
        self._histograms["request_prefill_time_seconds"].observe(max(0.0, first - arrival - queue_seconds))
        self._histograms["request_decode_time_seconds"].observe(end - first)
        self._histograms["request_inference_time_seconds"].observe(max(0.0, end - arrival - queue_seconds))
        if num_tokens > 1:
            self._histograms["request_time_per_output_token_seconds"].observe((end - first) / (num_tokens - 1))
