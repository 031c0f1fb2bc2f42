"""Prometheus metrics of the server, with the suffixes and labels of vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from sageLLM.runtime.server.messages import Load, Ready
from sageLLM.runtime.server.plain_metrics import Count, Distribution, PlainCounter, PlainHistogram

REASONS = ("stop", "length", "abort", "error", "repetition")
REFUSALS = ("requests", "tokens", "draining", "not_ready", "auth", "body")
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
TIERS = ("device", "host", "p2p", "disk", "external_unspecified")
ABSENT = {
    "external_prefix_cache_queries": "Prompt tokens looked up in a cache outside of the engine, which has none.",
    "external_prefix_cache_hits": "Prompt tokens found there.",
    "mm_cache_queries": "Images looked up; only texts are served.",
    "mm_cache_hits": "Images found.",
    "estimated_flops_per_gpu": "Not estimated, as by vLLM without its option for it.",
    "estimated_read_bytes_per_gpu": "Not estimated.",
    "estimated_write_bytes_per_gpu": "Not estimated.",
}
"""Counters that are always 0, for boards that divide by them."""
BLOCK_STATES = ("used", "cached", "free")
MODES = ("strict", "time_share", "hybrid", "auto")

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


NO_LOAD = msgspec.convert([0] * (len(Load.__struct_fields__) - 1), Load)
"""The counters of an engine that has just started."""


class Metrics:
    """All series of one server, under `namespace:`; labelled with the model's name and the engine."""

    def __init__(self, namespace: str, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._namespace, self._values = namespace, {"model_name": model_name, "engine": "0"}
        self._previous: Load | None = None
        tokens = token_buckets(MAX_BUCKET)

        self.num_running = self._gauge("num_requests_running", "Requests with KV.")
        self.num_waiting = self._gauge("num_requests_waiting", "Requests without KV.")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use, from 0 to 1.")
        waiting = self._gauge("num_requests_waiting_by_reason", "Requests without KV, by reason.", "reason")
        self._waiting = {
            reason: waiting.labels(**self._values, reason=reason) for reason in ("capacity", "preempted", "deferred")
        }
        blocks = self._gauge("kv_blocks", "KV blocks by state.", "state")
        self._blocks = {state: blocks.labels(**self._values, state=state) for state in BLOCK_STATES}
        mode = self._gauge("pd_mode", "1 for the mode of the prefill/decode scheduler.", "mode")
        self._modes = {name: mode.labels(**self._values, mode=name) for name in MODES}
        self.queued_requests = self._gauge("num_requests_queued", "Admitted requests without a first token.")
        self.queued_tokens = self._gauge("num_tokens_queued", "Prompt tokens of these requests.")

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests with a first token.")
        tokens_by = PlainCounter(f"{namespace}:generation_tokens", "Generated tokens.", [*self._values], self.registry)
        self.generation_tokens = tokens_by.labels(self._values)
        self.preemptions = self._counter("num_preemptions", "Requests that lost their KV.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.transfers = self._counter("kv_transfers", "Requests with KV copied between the pools of strict mode.")
        phases = self._counter("phase_tokens", "Tokens that steps have computed, by phase.", "phase")
        self._phases = {phase: phases.labels(**self._values, phase=phase) for phase in ("prefill", "decode")}
        self.restarts = self._counter("engine_restarts", "Starts of the engine after it was lost.")
        by_source = self._counter("prompt_tokens_by_source", "Prompt tokens by their source.", "source")
        self._computed = by_source.labels(**self._values, source="local_compute")
        self._cached = by_source.labels(**self._values, source="local_cache_hit")
        by_source.labels(**self._values, source="external_kv_transfer")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        tiers = self._counter("prompt_tokens_cached_by_source", "These tokens by the tier of their KV.", "source")
        self._tiers = {tier: tiers.labels(**self._values, source=tier) for tier in TIERS}
        for name, text in ABSENT.items():
            self._counter(name, text)
        asleep = self._gauge("engine_sleep_state", "1 for the state of the engine, which never sleeps.", "sleep_state")
        for state in SLEEP_STATES:
            asleep.labels(**self._values, sleep_state=state).set(state == "awake")
        success = self._counter("request_success", "Answers that have ended, by reason.", "finished_reason")
        self._ends = {reason: success.labels(**self._values, finished_reason=reason) for reason in REASONS}
        labels, name = [*self._values, "reason"], f"{namespace}:admission_rejections"
        refused = PlainCounter(name, "Refused requests, by reason.", labels, self.registry)
        self._refusals = {reason: refused.labels(self._values | {"reason": reason}) for reason in REFUSALS}

        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Time to the first token.", TTFT)
        gaps = f"{namespace}:inter_token_latency_seconds"
        gaps_by = PlainHistogram(gaps, "Time between tokens.", [*self._values], self.registry, ITL)
        self.inter_token_latency = gaps_by.labels(self._values)
        self.time_per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, per answer.", ITL
        )
        self.e2e_latency = self._histogram("e2e_request_latency_seconds", "Time to the end of an answer.", LATENCY)
        self.queue_time = self._histogram("request_queue_time_seconds", "Time until the first step.", LATENCY)
        self.prefill_time = self._histogram("request_prefill_time_seconds", "First step to first token.", LATENCY)
        self.decode_time = self._histogram("request_decode_time_seconds", "First token to the end.", LATENCY)
        self.inference_time = self._histogram("request_inference_time_seconds", "First step to the end.", LATENCY)
        self.request_prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", tokens)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens of an answer.", tokens)
        self.request_max = self._histogram("request_max_num_generation_tokens", "Largest max_tokens asked for.", tokens)
        self.request_params_max = self._histogram("request_params_max_tokens", "max_tokens of a request.", tokens)
        self.request_computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were not cached.", tokens
        )
        self.request_n = self._histogram("request_params_n", "n of a request.", (1, 2, 5, 10, 20))
        self.request_preemptions = self._histogram(
            "request_num_preemptions", "Times that an answer lost its KV.", (0, 1, 2, 3, 5, 10, 20)
        )
        self.step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens of a step: the mean of the steps between two reports.", STEP_TOKENS
        )

        workers = "Requests of each prefill and decode worker; its epoch counts its starts."
        self._workers = self._gauge("pd_worker_requests", workers, "worker", "role", "state", "epoch")

        # The name and the labels are those of prometheus-fastapi-instrumentator, which vLLM's boards read.
        names = ["handler", "method", "status"]
        self.http_requests = PlainCounter("http_requests", "HTTP responses.", names, self.registry)
        self.http_seconds = PlainHistogram(
            "http_request_duration_seconds",
            "Time of HTTP requests.",
            names[:2],
            self.registry,
            Histogram.DEFAULT_BUCKETS[:-1],
        )
        self._http: dict[tuple[str, str, int], tuple[Count, Distribution]] = {}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

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
        for name, gauge in self._modes.items():
            gauge.set(name == ready.mode)
        self._blocks["free"].set(ready.num_kv_blocks)
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
        self.num_running.set(load.num_running)
        self.num_waiting.set(load.num_waiting)
        self._waiting["preempted"].set(load.num_preempted)
        self._waiting["capacity"].set(load.num_waiting - load.num_preempted)
        total = load.kv_blocks_total
        self.kv_usage.set(load.kv_blocks_used / total if total else 0)
        self._blocks["used"].set(load.kv_blocks_used)
        self._blocks["cached"].set(load.kv_blocks_cached)
        self._blocks["free"].set(total - load.kv_blocks_used - load.kv_blocks_cached)
        before = self._previous
        if before is None or before.num_steps > load.num_steps:
            before = NO_LOAD
        self._previous = load
        self.preemptions.inc(load.num_preemptions - before.num_preemptions)
        self.prefix_queries.inc(load.prefix_cache_queries - before.prefix_cache_queries)
        self.prefix_hits.inc(load.prefix_cache_hits - before.prefix_cache_hits)
        self.transfers.inc(load.transfers - before.transfers)
        num_prefill = load.num_prefill_tokens - before.num_prefill_tokens
        num_decode = load.num_decode_tokens - before.num_decode_tokens
        self._phases["prefill"].inc(num_prefill)
        self._phases["decode"].inc(num_decode)
        for _ in range(num_steps := load.num_steps - before.num_steps):
            self.step_tokens.observe((num_prefill + num_decode) / num_steps)
        self._workers.clear()
        for worker in load.workers:
            labels = {"worker": str(worker.number), "role": worker.role, "state": worker.state}
            self._workers.labels(**self._values, **labels, epoch=str(worker.epoch)).set(worker.num_requests)

    def lose_engine(self) -> None:
        """The engine has ended, and its requests and counters with it."""
        self._previous = None
        for gauge in (self.num_running, self.num_waiting, self.kv_usage, *self._waiting.values()):
            gauge.set(0)
        self.restarts.inc()

    def count_prompt(self, num_tokens: int, num_cached: int, num_answers: int) -> None:
        self.request_n.observe(num_answers)
        self.request_computed.observe(num_tokens - num_cached)
        self.prompt_tokens_cached.inc(num_cached)
        self._tiers["device"].inc(num_cached)
        self.prompt_tokens.inc(num_tokens)
        self._computed.inc(num_tokens - num_cached)
        self._cached.inc(num_cached)

    def count_end(self, reason: str) -> None:
        self._ends[reason].inc()

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
        self.request_preemptions.observe(num_preemptions)
        self.request_prompt.observe(num_prompt)
        self.request_generation.observe(num_tokens)
        self.request_max.observe(max_tokens or num_tokens)
        if max_tokens is not None:
            self.request_params_max.observe(max_tokens)
        self.e2e_latency.observe(end - arrival)
        self.queue_time.observe(queue_seconds)
        self.prefill_time.observe(max(0.0, first - arrival - queue_seconds))
        self.decode_time.observe(end - first)
        self.inference_time.observe(max(0.0, end - arrival - queue_seconds))
        if num_tokens > 1:
            self.time_per_token.observe((end - first) / (num_tokens - 1))
