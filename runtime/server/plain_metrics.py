"""Counters and histograms for the hot paths: plain numbers, which the event loop alone writes and a scrape reads.

prometheus_client's own have locks and checks that cost more than the encoding of a token's chunk.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Count:
    """The value of a counter for one set of labels."""

    __slots__ = ("created", "value")

    def __init__(self) -> None:
        self.value, self.created = 0, time.time()

    def inc(self, amount: int = 1) -> None:
        self.value += amount


class Distribution:
    """The buckets of a histogram for one set of labels; the last one is unbounded."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self.total = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class PlainCounter(Collector):
    """A counter by labels; names and text as in prometheus_client's."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name, self._text, self._labels = name, text, list(labels)
        self._children: dict[tuple[str, ...], Count] = {}
        registry.register(self)

    def labels(self, values: Mapping[str, str]) -> Count:
        return self._children.setdefault(tuple(values[name] for name in self._labels), Count())

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, count in list(self._children.items()):
            family.add_metric(values, count.value, count.created)
        yield family


class PlainHistogram(Collector):
    """A histogram by labels; names, text and bounds as in prometheus_client's."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry, bounds: Sequence[float]
    ) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, list(labels), tuple(map(float, bounds))
        self._children: dict[tuple[str, ...], Distribution] = {}
        registry.register(self)

    def labels(self, values: Mapping[str, str]) -> Distribution:
        return self._children.setdefault(tuple(values[name] for name in self._labels), Distribution(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        ends = [*map(str, self._bounds), "+Inf"]
        for values, found in list(self._children.items()):
            family.add_metric(values, list(zip(ends, accumulate(found.counts), strict=True)), found.total)
        yield family
