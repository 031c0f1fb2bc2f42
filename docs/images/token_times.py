"""Draws the time between tokens of running decodes while prompts arrive, from benchmarks/results/disaggregation.json.

`python benchmarks/disaggregation.py tail --json benchmarks/results/disaggregation.json` writes the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from measured import result
from svg import Drawing

WIDTH, HEIGHT = 900, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 880, 52, 262
ROWS = {
    "strict, 1+1 workers": ("prefill and decode workers (strict)", "blue"),
    "hybrid, chunks of 512": ("one process (hybrid, chunks of 512)", "orange"),
}
TICKS = (10, 100, 1000)
"""Milliseconds on the axis."""
TITLE = "Milliseconds between tokens of 4 running decodes while prompts of 2000 tokens arrive"
Place = Callable[[float, float], tuple[float, float]]
"""The point of seconds and milliseconds."""


def draw(theme: str) -> str:
    """The plot as SVG text: the longest time between two tokens in each window, on a logarithmic axis."""
    d, measured = Drawing(WIDTH, HEIGHT, theme), result("disaggregation")
    d.text(LEFT, 22, TITLE, bold=True, size=14)
    rows = {name: measured["rows"][name] for name in ROWS}
    seconds = max(at for row in rows.values() for at, _ in row["windows"])
    place = _scale(seconds, [ms for row in rows.values() for _, ms in row["windows"]])
    _axes(d, place, seconds, [at for at in measured["prompts_s"] if at < seconds])
    for index, (name, (label, colour)) in enumerate(ROWS.items()):
        d.line(*(place(at, ms) for at, ms in rows[name]["windows"]), colour=colour, width=1.8)
        _legend(d, BOTTOM + 22 + index * 18, label, colour, rows[name])
    facts = measured["machine"]
    machine = f"{facts['cpu']}, {facts['cores']} cores, load {measured['load']:g}, {facts['date']}"
    source = f"the longest in each {measured['window_s']:g} s of {seconds:.0f} s; {machine}"
    d.text(LEFT, HEIGHT - 10, source, size=12, colour="soft")
    return d.render("Time between tokens of decodes on a separate worker and in one process while prompts arrive")


def _scale(seconds: float, found: list[float]) -> Place:
    low, high = math.log10(min(*found, TICKS[0])), math.log10(max(*found, TICKS[-1]))

    def place(at: float, ms: float) -> tuple[float, float]:
        share = (math.log10(ms) - low) / (high - low)
        return round(LEFT + (RIGHT - LEFT) * at / seconds, 1), round(BOTTOM - (BOTTOM - TOP) * share, 1)

    return place


def _axes(d: Drawing, place: Place, seconds: float, prompts: list[float]) -> None:
    for tick in TICKS:
        _, y = place(0.0, tick)
        d.line((LEFT, y), (RIGHT, y), colour="line", width=1)
        d.text(LEFT - 8, y + 4, f"{tick}", size=12, colour="soft", anchor="end")
    for at in prompts:
        x, _ = place(at, TICKS[0])
        d.line((x, TOP - 8), (x, BOTTOM), colour="edge", width=1)
        d.text(x + 5, TOP, "prompt", size=12, colour="soft")


def _legend(d: Drawing, y: float, label: str, colour: str, row: dict[str, Any]) -> None:
    p99, ratio = row["burst_p99_ms"], row["burst_p99_over_quiet_p99"]
    d.bar(LEFT, y - 7, 18, 4, colour)
    d.text(LEFT + 26, y, f"{label}: p99 {p99:g} ms, {ratio:g} times that without prompts", size=12.5)
