"""Request traces: arrival times with prompt and answer lengths, read from files or generated from a seed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

MOONCAKE_BLOCK = 512
"""Tokens per entry of `hash_ids` in a Mooncake trace."""


class TraceError(ValueError):
    """A trace file is invalid; the message has the file and the line."""


class BadRowError(TraceError):
    """A row of a trace is invalid, while the file as a whole has the expected form."""


@dataclass(slots=True)
class SkippedRows:
    """Rows of a trace that were skipped, and the message of the first."""

    num: int = 0
    first: str = ""

    def add(self, error: BadRowError) -> None:
        """Counts a row."""
        self.num += 1
        self.first = self.first or str(error)


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: arrival in seconds since the start of the trace, and prompt and answer tokens (at least 1 each).

    `block_hashes` identify the contents of the prompt in blocks of `hash_block` tokens: requests that begin with the
    same hashes share that prefix. Without them a prompt shares no prefix.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_hashes: tuple[int, ...] = ()
    hash_block: int = MOONCAKE_BLOCK

    def prompt_token_ids(self, number: int) -> list[int]:
        """A prompt of this length: each token is the hash of its block, or the request's `number` without hashes."""
        if not self.block_hashes:
            return [number] * self.num_prompt_tokens
        tokens: list[int] = []
        for name in self.block_hashes:
            tokens += [name] * self.hash_block
        missing = self.num_prompt_tokens - len(tokens)
        return tokens[: self.num_prompt_tokens] if missing <= 0 else tokens + [self.block_hashes[-1]] * missing


Trace = Sequence[TraceRequest]
ParseRow = Callable[[], TraceRequest]
"""Parses one row of a file; raises BadRowError."""


def read_trace(path: Path, skipped: SkippedRows | None = None) -> list[TraceRequest]:
    """Reads a trace by the file's suffix: Azure's csv, Mooncake's jsonl, or JSON pairs of prompt and output lengths.

    Pairs lack times: all arrive at 0 until `at_rate` spreads them. Raises TraceError for an invalid file. An invalid
    row is counted in `skipped`, and without it raises BadRowError.
    """
    readers = {".csv": _azure_rows, ".jsonl": _json_lines, ".json": _pairs}
    if path.suffix not in readers:
        raise TraceError(f"{path}: the suffix of a trace must be one of {', '.join(readers)}")
    trace: list[TraceRequest] = []
    for parse in readers[path.suffix](path):
        try:
            trace.append(parse())
        except BadRowError as error:
            if skipped is None:
                raise
            skipped.add(error)
    if not trace:
        raise TraceError(f"{path}: expected at least one valid request, got none")
    return _from_zero(trace)


def _azure_rows(path: Path) -> Iterator[ParseRow]:
    """Azure's LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        columns = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
        try:
            if not columns <= set(rows.fieldnames or ()):
                raise TraceError(f"{path}:1: expected the columns {', '.join(sorted(columns))}")
            for row in rows:
                yield partial(_azure_request, path, rows.line_num, row)
        except csv.Error as error:  # the reader cannot continue after it
            raise TraceError(f"{path}:{rows.line_num}: {error}") from None


def _azure_request(path: Path, line: int, row: dict[str, str]) -> TraceRequest:
    try:
        when = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        return _request(when, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRowError(f"{path}:{line}: {error}") from None


def _json_lines(path: Path) -> Iterator[ParseRow]:
    """One request per line: Mooncake's (timestamp in ms) or that of a serving timeline (arrival_time in seconds)."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield partial(_jsonl_request, path, number, line)


def _jsonl_request(path: Path, line: int, text: str) -> TraceRequest:
    try:
        row = json.loads(text)
        if "arrival_time" in row:
            return _request(float(row["arrival_time"]), int(row["input_toks"]), int(row["output_toks"]))
        names = tuple(int(name) for name in row.get("hash_ids", ()))
        return _request(float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), names)
    except KeyError as error:
        raise BadRowError(f"{path}:{line}: the key {error} is missing") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise BadRowError(f"{path}:{line}: {error}") from None


def _pairs(path: Path) -> Iterator[ParseRow]:
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TraceError(f"{path}: expected a list of [prompt tokens, output tokens]: {error}") from None
    if not isinstance(pairs, list):
        raise TraceError(f"{path}: expected a list of [prompt tokens, output tokens], got {type(pairs).__name__}")
    for number, pair in enumerate(pairs):
        yield partial(_pair_request, path, number, pair)


def _pair_request(path: Path, number: int, pair: Any) -> TraceRequest:
    try:
        prompt, output = pair
        return _request(0.0, int(prompt), int(output))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRowError(f"{path}: expected [prompt tokens, output tokens] in entry {number}: {error}") from None


def _request(when: float, prompt: int, output: int, names: tuple[int, ...] = ()) -> TraceRequest:
    if not math.isfinite(when):
        raise ValueError(f"expected a finite time, got {when}")
    if prompt < 1 or output < 1:
        raise ValueError(f"expected at least one prompt and one output token, got {prompt} and {output}")
    return TraceRequest(when, prompt, output, names)


def _from_zero(trace: list[TraceRequest]) -> list[TraceRequest]:
    """The requests in order of arrival, with times relative to the first."""
    ordered = sorted(trace, key=lambda request: request.arrival_s)
    return [replace(request, arrival_s=request.arrival_s - ordered[0].arrival_s) for request in ordered]


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds of a Poisson process of `rate` requests per second; the first is 0.

    The gaps come from NumPy's RandomState, which has a frozen stream, so a seed means the same trace in every version.
    """
    if not rate > 0:  # also NaN
        raise ValueError(f"the rate must be more than 0 requests per second, got {rate}")
    gaps = np.random.RandomState(seed).exponential(1 / rate, size=max(num_requests - 1, 0))
    return [0.0, *(float(time) for time in np.cumsum(gaps))][:num_requests]


def at_rate(trace: Iterable[TraceRequest], rate: float, seed: int) -> list[TraceRequest]:
    """The same requests in the same order, arriving as a Poisson process."""
    requests = list(trace)
    times = poisson_arrivals(len(requests), rate, seed)
    return [replace(request, arrival_s=time) for request, time in zip(requests, times, strict=True)]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths in tokens, by median and 90th percentile, clipped to 1 .. `limit`."""

    p50: float
    p90: float
    limit: int

    def __post_init__(self) -> None:
        if not 0 < self.p50 <= self.p90 < math.inf:
            raise ValueError(
                f"expected a median of lengths above 0 and a p90 of at least the median, got {self.p50} and {self.p90}"
            )

    def draw(self, random: np.random.RandomState, num: int) -> list[int]:
        """Draws `num` lengths."""
        z90 = 1.2815515655446004  # the 90th percentile of a standard normal
        sigma = np.log(self.p90 / self.p50) / z90
        drawn = random.lognormal(np.log(self.p50), sigma, size=num)
        return [int(length) for length in np.clip(np.rint(drawn), 1, self.limit)]


def synthetic(num_requests: int, rate: float, prompt: Lengths, output: Lengths, seed: int) -> list[TraceRequest]:
    """Requests with random lengths that arrive as a Poisson process, determined by the seed."""
    random = np.random.RandomState(seed)
    prompts, outputs = prompt.draw(random, num_requests), output.draw(random, num_requests)
    times = poisson_arrivals(num_requests, rate, seed)
    return [TraceRequest(*row) for row in zip(times, prompts, outputs, strict=True)]
