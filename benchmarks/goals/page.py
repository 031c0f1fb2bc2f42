"""The table of the goals of the CPU engine, from the files of benchmarks/results: aim, figures, bound and command."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from publish import replace_block
from table import best_peer, voids_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("peers.json", "peers_long.json", "peers_avx2.json")
"""Comparisons of the usual workloads, of long contexts and many requests, and of restricted instructions."""
SHAPES = ("135m", "0.6b")
BEGIN, END = "<!-- goals: begin -->\n", "<!-- goals: end -->\n"
UNMEASURED = "not measured"
PEER_ROWS = {
    "prefill of 256, 1024, 4096: ratio": ("1.3", ("prefill_256", "prefill_1024", "prefill_4096"), "native"),
    "decode after 128, 2048, 8192: ratio": ("1.5", ("decode", "decode_2048", "decode_8192"), "native"),
    "16, 32, 64 requests: ratio": ("1.5", ("serve_16", "serve_32", "serve_64"), "native"),
    "AVX2 alone, decode and prefill of 1024: ratio": ("1.2", ("decode", "prefill_1024"), "avx2"),
}
"""Ratios to the best 16-bit engine: the aim, the workloads and the instructions."""
GEMMS, ATTENTION, ROW_OPS = (
    ("linear", "linear_silu_mul"),
    ("paged_prefill_attention",),
    ("fused_add_rms_norm", "qk_rope_kv_store", "qk_norm_rope_kv_store"),
)


def show(*, publish: bool) -> None:
    """Prints the table, or writes it into docs/benchmarks.md."""
    goals, peers = read("goals.json"), [read(name) for name in PEERS]
    block = text_of(goals, peers)
    if publish:
        replace_block(ROOT / "docs" / "benchmarks.md", block, (BEGIN, END))
    else:
        print(block)


def read(name: str) -> dict[str, Any]:
    """A file of results; empty if it has not been measured."""
    path = RESULTS / name
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def text_of(goals: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> str:
    """The conditions and the table, as Markdown."""
    machine = goals["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}. "
    busy = "Figures with * are of a machine that other work used too.\n\n"
    lines = ["| goal | aim | 135M | 0.6B | command |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in (*peer_rows(peers), *own_rows(goals["parts"]))]
    return where + busy + "\n".join(lines) + "\n"


def peer_rows(peers: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Ratios to the best engine of 16-bit weights, with the fraction of the machine's limit."""
    rows = []
    for title, (aim, figures, isa) in PEER_ROWS.items():
        cells = [", ".join(ratio(peers, shape, isa, figure) for figure in figures) for shape in SHAPES]
        rows.append((title, f">= {aim}", *cells, "`benchmarks/peers/run.py`"))
    return rows


def ratio(peers: Sequence[Mapping[str, Any]], shape: str, isa: str, figure: str) -> str:
    """Ours over the best other engine in the last of the comparisons that has both."""
    found = UNMEASURED
    for result in peers:
        row = result.get("rows", {}).get(shape, {}).get(isa, {}).get(figure, {})
        best = best_peer(figure, row, "16-bit", voids_of(result, shape)) if row else None
        if best is not None and "ours" in row:
            limit = row["ours"].get("fraction_of_limit")
            of_limit = f" ({limit:.0%} of limit)" if limit is not None else ""
            star = "" if result["is_quiet"] else "*"
            found = f"{row['ours']['median'] / row[best]['median']:.2f}{star} {best}{of_limit}"
    return found


def own_rows(parts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Ratios within this engine."""

    def row(title: str, aim: str, part: str, cell: Any) -> tuple[str, ...]:
        cells = []
        for shape in SHAPES:
            found = parts.get(part, {}).get(shape) or (parts.get(part, {}).get("any") if shape == SHAPES[0] else None)
            cells.append(cell(found) + ("" if found["is_quiet"] else "*") if found else "")
        return title, aim, *cells, f"`benchmarks/goals/run.py --parts {part}`"

    return [
        row("GEMMs of 1024 rows, fraction of the peak", ">= 0.45", "profile", lambda f: of_peak(f, GEMMS)),
        row("attention of 1024 rows, fraction of the peak", ">= 0.3", "profile", lambda f: of_peak(f, ATTENTION)),
        row("row kernels, multiple of their memory bound", "<= 1.2", "profile", of_memory),
        row("first prefill, rate of later ones", ">= 0.95", "first_prefill", lambda f: f"{f['of_later']:.2f}"),
        row("decode, rate of a plain read of the weights", ">= 0.9", "reads", reads),
        row("chunk next to 16 decodes, rate of the sum of both", ">= 0.9", "hybrid", lambda f: f"{f['of_sum']:.2f}"),
        row("float32 decode attention at width 128, ratio to torch", ">= 1.1", "float_attention", attention),
        row("start to first token, s", "<= 1.2", "start_up", lambda f: f"{f['total']:.2f}"),
        row("peak memory, multiple of the weights", "<= 1.2", "start_up", lambda f: f"{f['peak_of_weights']:.2f}"),
        row("first start ever, s", "<= 10", "first_start", lambda f: f"{f['total']:.1f}"),
    ]  # fmt: skip


def of_peak(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    ops = figures["prefill"]["ops"]
    return ", ".join(f"{ops[name]['of_peak']:.2f}" for name in names if name in ops)


def of_memory(figures: Mapping[str, Any]) -> str:
    ops = figures["prefill"]["ops"]
    return ", ".join(f"{1 / ops[name]['of_reads']:.2f} {name}" for name in ROW_OPS if name in ops)


def reads(figures: Mapping[str, Any]) -> str:
    return f"{figures['of_by_weight']:.2f} weight by weight, {figures['of_whole']:.2f} in one loop"


def attention(figures: Mapping[str, Any]) -> str:
    return f"{figures['least']:.2f} to {max(figures['ratios'].values()):.2f}"
