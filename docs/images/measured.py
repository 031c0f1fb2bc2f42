"""Draws the comparison with other engines and prints the README's figures, both from benchmarks/results/*.json.

python docs/images/measured.py      prints each figure of the README's table, and the dates
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from svg import Drawing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WIDTH, HEIGHT = 1100, 334
ENGINES = {
    "ours": ("sageLLM", "blue"),
    "openvino": ("OpenVINO", "edge"),
    "llama.cpp": ("llama.cpp", "edge"),
    "transformers": ("transformers", "edge"),
}
SHAPES = {"135m": "SmolLM-135M shape", "0.6b": "Qwen3-0.6B shape"}
WORKLOADS = {
    "decode": "decode, 1 request",
    "prefill": "prefill, 1024 tokens",
    "serve_16": "16 requests, output",
    "serve_32": "32 requests, output",
}
COLUMN, LEFT, ROW = 270, 20, 21
MAX_BAR = 106


def draw(theme: str) -> str:
    """The plot as SVG text: bars are medians, whiskers the least and the largest round."""
    d = Drawing(WIDTH, HEIGHT, theme)
    d.text(LEFT, 26, "Tokens per second, more is better", bold=True, size=15)
    d.text(LEFT + 310, 26, "bar: median; whisker: slowest and fastest round", size=12, colour="soft")
    top = 56
    for shape, title in SHAPES.items():
        d.text(LEFT, top, f"{title}, bfloat16", bold=True, size=13)
        figures = peer_figures(shape)
        for i, (name, label) in enumerate(WORKLOADS.items()):
            _bars(d, LEFT + i * COLUMN, top + 26, label, figures[name])
        top += 38 + (1 + max(len(figures[name]) for name in WORKLOADS)) * ROW
    facts = machine_facts("peers_135m_single")
    d.text(LEFT, HEIGHT - 16, f"{facts['cpu']}, {facts['cores']} cores, {facts['date']}", size=12, colour="soft")
    return d.render("Decode, prefill and serving throughput of sageLLM and of other engines on two CPU cores")


def _bars(d: Drawing, x: float, y: float, label: str, by_engine: dict[str, list[float]]) -> None:
    d.text(x, y, label, size=12.5)
    scale = MAX_BAR / max(max(values) for values in by_engine.values())
    for row, (engine, (name, colour)) in enumerate((e, n) for e, n in ENGINES.items() if e in by_engine):
        values, top = by_engine[engine], y + 10 + row * ROW
        median, is_ours = statistics.median(values), engine == "ours"
        slowest, fastest = (x + 88 + value * scale for value in (min(values), max(values)))
        d.text(x, top + 12, name, size=12, colour="text" if is_ours else "soft", bold=is_ours)
        d.bar(x + 88, top, median * scale, 15, colour, 1 if is_ours else 0.55)
        d.line((slowest, top + 7.5), (fastest, top + 7.5), colour="text", width=1)
        d.text(fastest + 6, top + 12, f"{median:,.0f}" if median >= 100 else f"{median:.1f}", size=12, bold=is_ours)


def result(name: str) -> dict[str, Any]:
    """The contents of benchmarks/results/NAME.json."""
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def machine_facts(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = result(name)["machine"]
    return facts


def peer_figures(shape: str) -> dict[str, dict[str, list[float]]]:
    """Workload -> engine -> one value per round, of one request and of many."""
    single, serving = (result(f"peers_{shape}_{load}")["shapes"][shape]["figures"] for load in ("single", "serving"))
    return {**single, **serving}


def ratio(by_engine: dict[str, list[float]]) -> float:
    """The median over the rounds of ours divided by the best other engine."""
    best = max((v for engine, v in by_engine.items() if engine != "ours"), key=statistics.median)
    return statistics.median(a / b for a, b in zip(by_engine["ours"], best, strict=True))


def table_figures() -> dict[str, str]:
    """The figures of the README's table by the row's first words; a test compares them."""
    foundation, scheduler = result("foundation")["figures"], result("scheduler")["figures"]
    peers = peer_figures("135m")
    median = {name: statistics.median(by_engine["ours"]) for name, by_engine in peers.items()}
    outside = (foundation["engine"][f"outside_plan_us_batch_{size}"] / 1e3 for size in (1, 32))
    lines = foundation["specs"]
    models = lines["yaml_lines_per_model"]
    return {
        "generate everything": f"{foundation['generate']['generate_cold_s']:.1f} s",
        "generate after": f"{foundation['generate']['generate_one_op_s']:.1f} s",
        "build and optimise": f"{foundation['graphs']['build_and_optimise_80_layers_ms']:.0f} ms",
        "schedule and update": f"{scheduler['decode_256']['p50']:.0f} us",
        "engine time": ", ".join(f"{ms:.2f} ms" for ms in outside),
        "SmolLM-135M shape": f"{median['decode']:.1f} tok/s, {ratio(peers['decode']):.2f}x",
        "prefill": f"{median['prefill']:.0f} tok/s, {ratio(peers['prefill']):.2f}x",
        "16 requests": f"{median['serve_16']:.0f} tok/s, {ratio(peers['serve_16']):.2f}x",
        "32 requests": f"{median['serve_32']:.0f} tok/s, {ratio(peers['serve_32']):.2f}x",
        "import": f"{median['startup_s']:.1f} s",
        "resident": f"{median['loaded_mb']:.0f} MB",
        "YAML lines": f"{lines['yaml_lines_per_op_median']:g}, {models['llama']}, {models['qwen3']}",
    }


def dates() -> list[str]:
    """The days on which the figures of the table and the plot were measured."""
    names = [
        "foundation",
        "scheduler",
        *(f"peers_{shape}_{load}" for shape in SHAPES for load in ("single", "serving")),
    ]
    return sorted({machine_facts(name)["date"] for name in names})


if __name__ == "__main__":
    for row, figure in table_figures().items():
        print(f"{row:<22} {figure}")
    print(f"{'measured on':<22} {', '.join(dates())}")
