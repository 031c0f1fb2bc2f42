"""Service of a real engine as recorded in a serving timeline, and the error of a simulation against it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sageLLM.runtime.sim.metrics import Summary, Timeline
from sageLLM.runtime.sim.trace import TraceError

KEYS = ("arrival_time", "input_toks", "output_toks", "queued_ts", "first_token_ts", "last_token_ts")


def read_measured(path: Path) -> list[Timeline]:
    """The timelines of the requests in order of arrival, with times relative to the first arrival.

    `queued_ts`, `first_token_ts` and `last_token_ts` are times of the engine's clock, which starts elsewhere than that
    of `arrival_time`: the first request is taken to be queued when it arrives. Raises TraceError for another file.
    """
    rows = [_row(path, number, line) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line]
    if not rows:
        raise TraceError(f"{path}: expected at least one measured request, got none")
    rows.sort(key=lambda row: row["arrival_time"])
    first = rows[0]
    return [
        Timeline(
            number,
            row["arrival_time"] - first["arrival_time"],
            int(row["input_toks"]),
            int(row["output_toks"]),
            first_token_s=row["first_token_ts"] - first["queued_ts"],
            last_token_s=row["last_token_ts"] - first["queued_ts"],
        )
        for number, row in enumerate(rows)
    ]


def _row(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        row = json.loads(line)
        return {key: float(row[key]) for key in KEYS}
    except (KeyError, ValueError, TypeError) as error:
        raise TraceError(
            f"{path}:{number}: expected the measured times of a request ({', '.join(KEYS)}): {error}"
        ) from None


class Errors(NamedTuple):
    """Relative errors of a simulation: simulated / measured - 1."""

    ttft_mean: float
    ttft_p50: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float
    throughput: float

    def __str__(self) -> str:
        ttft = f"TTFT mean {self.ttft_mean:+.1%}, p50 {self.ttft_p50:+.1%}, p99 {self.ttft_p99:+.1%}"
        tpot = f"TPOT mean {self.tpot_mean:+.1%}, p99 {self.tpot_p99:+.1%}"
        return f"{ttft}; {tpot}; tok/s {self.throughput:+.1%}"


def errors_of(simulated: Summary, measured: Summary) -> Errors:
    """The errors of a simulation of the same requests."""
    return Errors(
        simulated.mean_ttft / measured.mean_ttft - 1,
        simulated.ttft[50] / measured.ttft[50] - 1,
        simulated.ttft[99] / measured.ttft[99] - 1,
        simulated.mean_tpot / measured.mean_tpot - 1,
        simulated.tpot[99] / measured.tpot[99] - 1,
        simulated.output_throughput / measured.output_throughput - 1,
    )


def errors_by_mode(results: Mapping[str, Summary], measured: Summary) -> dict[str, Errors]:
    """The errors of every mode."""
    return {mode: errors_of(one, measured) for mode, one in results.items()}
