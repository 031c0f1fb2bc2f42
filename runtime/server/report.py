"""The result of a load, as `vllm bench serve` prints and saves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sageLLM.runtime.server.load import Outcome

WIDTH = 50
METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
DEFAULT_METRICS = ("ttft", "tpot", "itl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Outcomes of the requests of one run of `duration` seconds; `setup` are the entries that describe the run."""

    outcomes: Sequence[Outcome]
    duration: float
    setup: dict[str, Any]
    metrics: Sequence[str] = DEFAULT_METRICS
    percentiles: Sequence[float] = (99.0,)

    @property
    def completed(self) -> list[Outcome]:
        return [one for one in self.outcomes if not one.error]

    def values(self, metric: str) -> list[float]:
        """The values of a metric in milliseconds: per request, and for `itl` per token."""
        done = self.completed
        match metric:
            case "ttft":
                found = [one.ttft for one in done]
            case "tpot":
                found = [one.tpot for one in done if one.output_len > 1]
            case "itl":
                found = [gap for one in done for gap in one.itls]
            case _:
                found = [one.latency for one in done]
        return [1e3 * value for value in found]

    def as_data(self, *, is_detailed: bool = False) -> dict[str, Any]:
        """vLLM's JSON; with `is_detailed`, the lists of every request too."""
        done = self.completed
        num_input, num_output = sum(one.prompt_len for one in done), sum(one.output_len for one in done)
        tokens_per_s, concurrent = self._peaks()
        data = {
            **self.setup,
            "duration": self.duration,
            "completed": len(done),
            "failed": len(self.outcomes) - len(done),
            "total_input_tokens": num_input,
            "total_output_tokens": num_output,
            "request_throughput": len(done) / self.duration,
            "output_throughput": num_output / self.duration,
            "total_token_throughput": (num_input + num_output) / self.duration,
            "max_output_tokens_per_s": tokens_per_s,
            "max_concurrent_requests": concurrent,
        }
        for metric in self.metrics:
            values = self.values(metric) or [0.0]
            data |= {
                f"mean_{metric}_ms": float(np.mean(values)),
                f"median_{metric}_ms": float(np.median(values)),
                f"std_{metric}_ms": float(np.std(values)),
            }
            data |= {f"p{p:g}_{metric}_ms": float(np.percentile(values, p)) for p in self.percentiles}
        if is_detailed:
            data |= {
                "input_lens": [one.prompt_len for one in self.outcomes],
                "output_lens": [one.output_len for one in self.outcomes],
                "start_times": [one.start for one in self.outcomes],
                "ttfts": [one.ttft for one in self.outcomes],
                "itls": [one.itls for one in self.outcomes],
                "generated_texts": [one.text for one in self.outcomes],
                "errors": [one.error for one in self.outcomes],
            }
        return data

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        data = self.as_data()
        yield _title(" Serving Benchmark Result ", "=")
        yield _row("Successful requests:", data["completed"])
        yield _row("Failed requests:", data["failed"])
        if self.setup.get("max_concurrency") is not None:
            yield _row("Maximum request concurrency:", self.setup["max_concurrency"])
        if self.setup.get("request_rate") not in (None, "inf"):
            yield _row("Request rate configured (RPS):", self.setup["request_rate"])
        yield _row("Benchmark duration (s):", self.duration)
        yield _row("Total input tokens:", data["total_input_tokens"])
        yield _row("Total generated tokens:", data["total_output_tokens"])
        yield _row("Request throughput (req/s):", data["request_throughput"])
        yield _row("Output token throughput (tok/s):", data["output_throughput"])
        yield _row("Peak output token throughput (tok/s):", data["max_output_tokens_per_s"])
        yield _row("Peak concurrent requests:", data["max_concurrent_requests"])
        yield _row("Total token throughput (tok/s):", data["total_token_throughput"])
        for metric in self.metrics:
            short, long = METRICS[metric]
            yield _title(long, "-")
            yield _row(f"Mean {short} (ms):", data[f"mean_{metric}_ms"])
            yield _row(f"Median {short} (ms):", data[f"median_{metric}_ms"])
            for percentile in self.percentiles:
                yield _row(f"P{percentile:g} {short} (ms):", data[f"p{percentile:g}_{metric}_ms"])
        yield "=" * WIDTH

    def _peaks(self) -> tuple[float, float]:
        """The most tokens in one second, and the most requests that were under way within one second."""
        done = self.completed
        if not done:
            return 0.0, 0.0
        origin = min(one.start for one in done)
        num_seconds = int(max(one.start + one.latency for one in done) - origin) + 1
        tokens, requests = np.zeros(num_seconds), np.zeros(num_seconds)
        for one in done:
            times = np.cumsum([one.start - origin + one.ttft, *one.itls])
            np.add.at(tokens, np.minimum(times.astype(int), num_seconds - 1), 1)
            requests[int(one.start - origin) : int(one.start - origin + one.latency) + 1] += 1
        return float(tokens.max()), float(requests.max())


def _title(text: str, char: str) -> str:
    return f"{{:{char}^{WIDTH}}}".format(text)


def _row(name: str, value: float | int) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"
