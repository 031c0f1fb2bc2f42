"""Makes the table of a comparison from the files of its processes: medians, spread, ratios, fractions of the limits.

python benchmarks/peers/table.py STATE [--markdown]
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from correctness import problem_of
from load import MAX_FOREIGN
from shapes import WEIGHT_BYTES, Work, work_of
from variants import KINDS, VARIANTS, Variant
from workloads import num_decoded, requests

UNITS = {
    "decode": "decode, 1 request, tok/s",
    "decode_2048": "decode after 2048, tok/s",
    "decode_8192": "decode after 8192, tok/s",
    "prefill_256": "prefill of 256, tok/s",
    "prefill_1024": "prefill of 1024, tok/s",
    "prefill_4096": "prefill of 4096, tok/s",
    "serve_16": "16 requests, output tok/s",
    "serve_32": "32 requests, output tok/s",
    "serve_64": "64 requests, output tok/s",
    "startup_cold_s": "start to first token, cold, s",
    "startup_s": "start to first token, s",
    "resident_mb": "resident after first token, MB",
    "peak_mb": "peak memory, MB",
}
LOWER_IS_BETTER = {"startup_cold_s", "startup_s", "resident_mb", "peak_mb"}
BEST_LOOPS = {
    "native": ("amx_bf16", "avx512_bf16", "avx512_f32", "avx2_f32"),
    "avx512": ("avx512_bf16", "avx512_f32", "avx2_f32"),
    "avx2": ("avx2_f32",),
    "quantised": ("amx_i8", "avx512_i8", "amx_bf16", "avx512_bf16", "avx512_f32", "avx2_f32"),
}


def result_of(state: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """All figures: the machine, its limits, the checks, and `rows` by shape, instruction set, figure and variant."""
    processes = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(state.glob("*.json"))}
    limits = mean_limits([one for name, one in processes.items() if name.startswith("limits.") and "error" not in one])
    checks = {name[len("check.") :]: one for name, one in processes.items() if name.startswith("check.")}
    measured = {n: p for n, p in processes.items() if not n.startswith(("limits.", "check.", "first-start."))}
    samples = all_samples(measured)
    rows: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for (shape, isa, figure, name), found in samples.items():
        variant = VARIANTS[name]
        kept = [value for value, foreign in found if foreign <= MAX_FOREIGN] if all_waited(measured) else None
        values = [value for value, _ in found] if kept is None else kept
        if not values:
            continue
        row = summary(values, len(found) - len(values))
        bound = bound_of(figure, work_of(shape), variant, isa, limits)
        if bound:
            row["fraction_of_limit"] = round(row["median"] / bound, 3)
        rows[shape][isa][figure][name] = row
    return {
        "machine": dict(machine),
        "is_quiet": all_waited(measured),
        "limits": limits,
        "checks": checks,
        "failures": {name: one["error"][-300:] for name, one in measured.items() if "error" in one},
        "rows": rows,
    }


def all_waited(measured: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every process waited for a quiet machine, so that disturbed figures are dropped."""
    return all(one.get("waited", False) for one in measured.values() if "error" not in one)


def all_samples(
    measured: Mapping[str, Mapping[str, Any]],
) -> dict[tuple[str, str, str, str], list[tuple[float, float]]]:
    """(value, foreign cores) by shape, instruction set, figure and variant."""
    found: dict[tuple[str, str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for name, process in measured.items():
        if "error" in process:
            continue
        head, isa, number = name.rsplit(".", 2)
        # A shape such as 0.6b has a point, too.
        shape = next(one for one in ("135m", "0.6b") if head.startswith(f"{one}."))
        variant = head[len(shape) + 1 :]
        start = "startup_cold_s" if number == "0" else "startup_s"
        for figure, value in ((start, process["startup_s"]), *((f, process[f]) for f in ("resident_mb", "peak_mb"))):
            found[shape, isa, figure, variant].append((value, 0.0))
        for workload, values in process["samples"].items():
            found[shape, isa, workload, variant] += [(value, foreign) for value, foreign in values]
    return found


def summary(values: list[float], num_dropped: int) -> dict[str, Any]:
    """Median, least and most, and the number of figures that were disturbed."""
    figures = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    return {**rounded, "samples": len(values), "dropped": num_dropped}


def mean_limits(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of the rates measured in this run: other work on the machine only lowers them."""
    if not found:
        return {}
    loops = {name for one in found for name in one["gflop_s"]}
    return {
        "read_gb_s": max(one["read_gb_s"] for one in found),
        "gflop_s": {name: max(one["gflop_s"].get(name, 0.0) for one in found) for name in sorted(loops)},
    }


def bound_of(figure: str, work: Work, variant: Variant, isa: str, limits: Mapping[str, Any]) -> float | None:
    """The rate at the limits: reads of weights and KV for decodes, multiply-adds for prompts, their sum for serving."""
    if not limits or variant.form not in WEIGHT_BYTES:
        return None
    read = limits["read_gb_s"] * 1e9
    loops = BEST_LOOPS["quantised" if variant.kind != "16-bit" and isa == "native" else isa]
    peak = max(limits["gflop_s"].get(loop, 0.0) for loop in loops) * 1e9
    kind, _, size = figure.partition("_")
    if kind == "decode":
        context = int(size or 128)
        return read / work.decode_bytes(variant.form, context + num_decoded(context) // 2)
    if kind == "prefill":
        return int(size) * peak / work.prompt_flops(int(size))
    if kind == "serve":
        asks = requests(int(size))
        prompts_s = sum(work.prompt_flops(len(one.prompt)) for one in asks) / peak
        num_steps = max(one.num_new for one in asks)
        kv_tokens = sum(one.num_new * (len(one.prompt) + one.num_new // 2) for one in asks)
        decodes_s = (num_steps * work.decode_bytes(variant.form, 0) + 2 * kv_tokens * work.kv_values) / read
        return sum(one.num_new for one in asks) / (prompts_s + decodes_s)
    return None


def best_peer(figure: str, by_variant: Mapping[str, Mapping[str, Any]], kind: str, voids: Iterable[str]) -> str | None:
    """The name of the best other engine of a class whose check has passed."""
    others = [n for n in by_variant if VARIANTS[n].engine != "ours" and VARIANTS[n].kind == kind and n not in {*voids}]
    choose = min if figure in LOWER_IS_BETTER else max
    return choose(others, key=lambda name: by_variant[name]["median"], default=None)


def voids_of(result: Mapping[str, Any], shape: str) -> dict[str, str]:
    """Variants whose tokens are wrong, and those that were not checked, with the reason."""
    found = {}
    for name in VARIANTS:
        check = result["checks"].get(f"{shape}.{name}")
        problem = "not checked" if check is None else check.get("error") or check.get("problem")
        if check and "largest_gap" in check:
            problem = problem_of(check, VARIANTS[name].tie_limit)
        if problem:
            found[name] = str(problem).strip().splitlines()[-1]
    return found


def text_of(result: Mapping[str, Any]) -> str:
    """Markdown: the conditions, then a table for each shape and instruction set."""
    machine, limits = result["machine"], result["limits"]
    lines = [f"{machine['date']}, {machine['cpu']}, {machine['threads']} threads."]
    if limits:
        loops = ", ".join(f"{name} {rate:.0f}" for name, rate in limits["gflop_s"].items())
        lines.append(f"Limits in this run: reads {limits['read_gb_s']:.1f} GB/s; GFLOP/s: {loops}.")
    if not result["is_quiet"]:
        lines.append("**Measured without waiting for a quiet machine: not for comparison.**")
    for shape, by_isa in result["rows"].items():
        voids = voids_of(result, shape)
        for isa, by_figure in by_isa.items():
            lines += ["", *table_of(shape, isa, by_figure, voids)]
        lines += [f"\n{name} is void: {reason}" for name, reason in voids.items() if reason != "not checked"]
    return "\n".join(lines)


def table_of(shape: str, isa: str, by_figure: Mapping[str, Any], voids: Mapping[str, str]) -> list[str]:
    """Median and spread in percent, of ours also the fraction of the limit, and the ratios to the best peers."""
    names = [name for name in VARIANTS if any(name in row for row in by_figure.values())]
    titles = [f"{n} ({VARIANTS[n].form}, KV {VARIANTS[n].kv})" for n in names]
    kinds = [kind for kind in KINDS if any(VARIANTS[name].kind == kind for name in names)]
    lines = [f"| {shape}, {isa} | {' | '.join([*titles, *(f'ours / best {kind}' for kind in kinds)])} |"]
    lines.append("|---" * (len(names) + len(kinds) + 1) + "|")
    for figure, unit in UNITS.items():
        row = by_figure.get(figure, {})
        if not row:
            continue
        cells = [cell_of(row.get(name), name in voids) for name in names]
        ratios = [ratio_of(figure, row, kind, voids) for kind in kinds]
        lines.append(f"| {unit} | {' | '.join([*cells, *ratios])} |")
    return lines


def cell_of(one: Mapping[str, Any] | None, is_void: bool) -> str:
    if one is None or is_void:
        return "void" if is_void and one is not None else ""
    spread = (one["most"] - one["least"]) / 2 / one["median"] if one["median"] else 0.0
    fraction = f", {one['fraction_of_limit']:.0%} of limit" if "fraction_of_limit" in one else ""
    return f"{one['median']:g} ±{spread:.0%}{fraction}"


def ratio_of(figure: str, row: Mapping[str, Any], kind: str, voids: Mapping[str, str]) -> str:
    best = best_peer(figure, row, kind, voids)
    ours = next((n for n in row if VARIANTS[n].engine == "ours" and VARIANTS[n].kind == kind and n not in voids), None)
    if best is None or ours is None:
        return ""
    return f"{row[ours]['median'] / row[best]['median']:.2f} ({best})"


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from machine import machine_facts

    print(text_of(result_of(Path(sys.argv[1]), machine_facts())))
