"""Counts of generated tokens and of the times between them, at the cost of two additions per token."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class TokenMeter(Collector):
    """The counter and the histogram of tokens.

    prometheus_client's own have locks and checks that cost more than a token's chunk. Here the event loop alone writes
    plain numbers; a scrape reads them.
    """

    def __init__(self, prefix: str, labels: Mapping[str, str], bounds: Sequence[float]) -> None:
        """`bounds` are the upper bounds of the histogram's buckets, in seconds."""
        self._prefix, self._labels, self._bounds = prefix, dict(labels), list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._num_tokens, self._seconds, self._created = 0, 0.0, time.time()

    def count(self, num_tokens: int, gap: float | None) -> None:
        """New tokens of one answer; `gap` is the time per token since the ones before, None for the first."""
        self._num_tokens += num_tokens
        if gap is not None:
            self._counts[bisect_left(self._bounds, gap)] += 1
            self._seconds += gap

    def collect(self) -> Iterator[Metric]:
        names, values = list(self._labels), list(self._labels.values())
        tokens = CounterMetricFamily(f"{self._prefix}generation_tokens", "Generated tokens.", labels=names)
        tokens.add_metric(values, self._num_tokens, self._created)
        yield tokens
        gaps = HistogramMetricFamily(f"{self._prefix}inter_token_latency_seconds", "Time between tokens.", labels=names)
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        gaps.add_metric(values, list(zip(bounds, accumulate(self._counts), strict=True)), self._seconds)
        yield gaps
