"""Reports of simulations as a table and as data, with a verdict on disaggregation."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sageLLM.runtime.sim.measured import errors_by_mode
from sageLLM.runtime.sim.metrics import PERCENTILES, Slo, Summary

Results = Mapping[str, Summary]
MIN_GAIN = 0.02
"""The relative gain in goodput from which disaggregation counts as worthwhile."""


def as_table(results: Results, slo: Slo, measured: Summary | None = None) -> str:
    """One line per mode: latency percentiles, SLO attainment, goodput and throughput.

    With a measured run of the same requests, a line for it and the errors of each mode follow.
    """
    points = "/".join(f"p{p}" for p in PERCENTILES)
    header = ["mode", f"TTFT ms {points}", f"TPOT ms {points}", f"E2E s {points}", "SLO %", "goodput/s", "tok/s"]
    rows = [[*header, "preempted", "refused"]]
    lines = results if measured is None else {**results, "measured": measured}
    for mode, one in lines.items():
        rows.append(
            [
                mode,
                _millis(one.ttft),
                _millis(one.tpot),
                "/".join(f"{one.e2e[p]:.2f}" for p in PERCENTILES),
                f"{100 * one.attainment:.1f}",
                f"{one.goodput:.2f}",
                f"{one.output_throughput:.0f}",
                str(one.num_preemptions),
                str(one.num_refused),
            ]
        )
    notes = verdict(results, slo) if measured is None else _errors(results, measured)
    return "\n".join([_aligned(rows), "", *notes])


def _errors(results: Results, measured: Summary) -> list[str]:
    """A line per mode with its errors against the measured run."""
    return [f"Error of {mode}: {errors}" for mode, errors in errors_by_mode(results, measured).items()]


def verdict(results: Results, slo: Slo) -> list[str]:
    """The mode with the best goodput, and whether disaggregating prefill and decode pays off."""
    best = max(results, key=lambda mode: results[mode].goodput)
    objective = f"TTFT <= {1e3 * slo.ttft_s:g} ms and TPOT <= {1e3 * slo.tpot_s:g} ms"
    lines = [f"Best for {objective}: {best}, {results[best].goodput:.2f} requests/s within it."]
    together = {mode: one for mode, one in results.items() if mode != "strict"}
    if "strict" not in results or not together:
        return lines
    rival = max(together, key=lambda mode: together[mode].goodput)
    ours, theirs = results["strict"].goodput, together[rival].goodput
    gain = ours / theirs - 1 if theirs else (1.0 if ours else 0.0)
    if gain > MIN_GAIN:
        lines.append(f"Disaggregation pays here: strict has {gain:+.0%} goodput against {rival} on as many devices.")
    else:
        lines.append(
            f"Disaggregation does not pay here: strict has {gain:+.0%} goodput against {rival} on as many devices."
        )
    return lines


def as_data(results: Results, slo: Slo, measured: Summary | None = None) -> dict[str, Any]:
    """The report as JSON data, with times in seconds and relative errors."""
    modes = {mode: asdict(one) for mode, one in results.items()}
    data: dict[str, Any] = {"slo": asdict(slo), "modes": modes, "verdict": verdict(results, slo)}
    if measured is not None:
        data["measured"] = asdict(measured)
        data["errors"] = {mode: errors._asdict() for mode, errors in errors_by_mode(results, measured).items()}
    return data


def _millis(by_percentile: Mapping[int, float]) -> str:
    return "/".join(f"{1e3 * by_percentile[p]:.0f}" for p in PERCENTILES)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
