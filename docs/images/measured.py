"""Draws the comparison with other engines and prints the README's figures, both from benchmarks/results/*.json.

The comparison is in peers.json, which `make bench-peers` writes; without it there is no plot.

python docs/images/measured.py      prints each figure of the README's table, and the dates
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from svg import Drawing

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WIDTH, HEIGHT = 1100, 376
ENGINES = {
    "sageLLM": ("ours",),
    "vLLM": ("vllm",),
    "OpenVINO": ("openvino", "openvino-kv16"),
    "llama.cpp": ("llama.cpp", "llama.cpp-f16"),
    "transformers": ("transformers",),
}
"""Names in the plot, and the variants of which the best is drawn: 16-bit weights."""
SHAPES = {"135m": "SmolLM-135M shape", "0.6b": "Qwen3-0.6B shape"}
WORKLOADS = {
    "decode": "decode, 1 request",
    "prefill_1024": "prefill, 1024 tokens",
    "serve_16": "16 requests, output",
    "serve_32": "32 requests, output",
}
COLUMN, LEFT, ROW = 270, 20, 21
MAX_BAR = 106


def draw(theme: str) -> str:
    """The plot as SVG text: bars are medians, whiskers the least and the largest sample."""
    d, compared = Drawing(WIDTH, HEIGHT, theme), result("peers")
    d.text(LEFT, 26, "Tokens per second, more is better", bold=True, size=15)
    d.text(LEFT + 310, 26, "bar: median; whisker: slowest and fastest sample", size=12, colour="soft")
    top = 56
    for shape, title in SHAPES.items():
        d.text(LEFT, top, f"{title}, 16-bit weights", bold=True, size=13)
        rows = compared["rows"].get(shape, {}).get("native", {})
        for i, (name, label) in enumerate(WORKLOADS.items()):
            _bars(d, LEFT + i * COLUMN, top + 26, label, best_by_engine(rows.get(name, {})))
        top += 38 + (1 + len(ENGINES)) * ROW
    facts = compared["machine"]
    d.text(LEFT, HEIGHT - 16, f"{facts['cpu']}, {facts['cores']} cores, {facts['date']}", size=12, colour="soft")
    return d.render("Decode, prefill and serving throughput of sageLLM and of other engines on two CPU cores")


def best_by_engine(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The fastest variant of each engine in a row of the table."""
    found = {}
    for engine, variants in ENGINES.items():
        measured = [row[variant] for variant in variants if variant in row]
        if measured:
            found[engine] = max(measured, key=lambda one: float(one["median"]))
    return found


def _bars(d: Drawing, x: float, y: float, label: str, by_engine: dict[str, dict[str, float]]) -> None:
    d.text(x, y, label, size=12.5)
    scale = MAX_BAR / max((one["most"] for one in by_engine.values()), default=1.0)
    for row, (engine, one) in enumerate(by_engine.items()):
        top, is_ours, median = y + 10 + row * ROW, engine == "sageLLM", one["median"]
        slowest, fastest = (x + 88 + one[name] * scale for name in ("least", "most"))
        d.text(x, top + 12, engine, size=12, colour="text" if is_ours else "soft", bold=is_ours)
        d.bar(x + 88, top, median * scale, 15, "blue" if is_ours else "edge", 1 if is_ours else 0.55)
        d.line((slowest, top + 7.5), (fastest, top + 7.5), colour="text", width=1)
        d.text(fastest + 6, top + 12, f"{median:,.0f}" if median >= 100 else f"{median:.1f}", size=12, bold=is_ours)


def has_comparison() -> bool:
    """Whether the other engines have been measured."""
    return (RESULTS / "peers.json").is_file()


def result(name: str) -> dict[str, Any]:
    """The contents of benchmarks/results/NAME.json."""
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def machine_facts(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = result(name)["machine"]
    return facts


def table_figures() -> dict[str, str]:
    """The figures of the README's table by the row's first words; a test compares them."""
    foundation, scheduler = result("foundation")["figures"], result("scheduler")["figures"]
    outside = (foundation["engine"][f"outside_plan_us_batch_{size}"] / 1e3 for size in (1, 32))
    lines = foundation["specs"]
    models = lines["yaml_lines_per_model"]
    return {
        "generate everything": f"{foundation['generate']['generate_cold_s']:.1f} s",
        "generate after": f"{foundation['generate']['generate_one_op_s']:.1f} s",
        "build and optimise": f"{foundation['graphs']['build_and_optimise_80_layers_ms']:.0f} ms",
        "schedule and update": f"{scheduler['decode_256']['p50']:.0f} us",
        "engine time": ", ".join(f"{ms:.2f} ms" for ms in outside),
        "YAML lines": f"{lines['yaml_lines_per_op_median']:g}, {models['llama']}, {models['qwen3']}",
    }


def dates() -> list[str]:
    """The days on which the figures of the table and the plot were measured."""
    names = ["foundation", "scheduler", *(["peers"] if has_comparison() else [])]
    return sorted({machine_facts(name)["date"] for name in names})


if __name__ == "__main__":
    for row, figure in table_figures().items():
        print(f"{row:<22} {figure}")
    print(f"{'measured on':<22} {', '.join(dates())}")
