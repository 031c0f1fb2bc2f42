"""Prints the figures of one shape: a row per workload, a column per engine, the ratio and the roofline."""

import statistics
from typing import Any

HIGHER_IS_BETTER = {"decode", "prefill", "serve_16", "serve_32"}
UNITS = {
    "decode": "tok/s, batch 1",
    "prefill": "tok/s, 1024 tokens",
    "serve_16": "tok/s, 16 requests",
    "serve_32": "tok/s, 32 requests",
    "startup_s": "s to first token",
    "loaded_mb": "MB resident, loaded",
}


def print_table(shape: str, result: dict[str, Any]) -> None:
    """Medians over the rounds; `ours/best` is the median of the ratios round by round to the best other engine."""
    figures: dict[str, dict[str, list[float]]] = result["figures"]
    peers = list(dict.fromkeys(peer for by_peer in figures.values() for peer in by_peer))
    print(f"\n{shape:<30}" + "".join(f"{peer:>14}" for peer in peers) + f"{'ours/best':>11}{'roofline':>10}")
    for name in (name for name in UNITS if name in figures):
        medians = {peer: statistics.median(values) for peer, values in figures[name].items()}
        cells = "".join(f"{medians[peer]:>14.1f}" for peer in peers)
        print(
            f"{name} ({UNITS[name]})".ljust(30)
            + cells
            + f"{ratio(name, figures[name]):>11}{roofline(name, result):>10}"
        )


def ratio(name: str, by_peer: dict[str, list[float]]) -> str:
    """Ours over the best other engine; with startup and memory the least is best, and a ratio below 1 is good."""
    others = {peer: values for peer, values in by_peer.items() if peer != "ours"}
    if not others or "ours" not in by_peer:
        return "-"
    choose = max if name in HIGHER_IS_BETTER else min
    best = choose(others.values(), key=statistics.median)
    return f"{statistics.median(a / b for a, b in zip(by_peer['ours'], best, strict=True)):.2f}"


def roofline(name: str, result: dict[str, Any]) -> str:
    """Tokens per second if decode did nothing but read the weights, or prefill nothing but multiply by them."""
    limits, num_bytes = result["limits"], result["weight_bytes"]
    if name == "decode":
        return f"{limits['read_gb_per_s'] * 1e9 / num_bytes:.0f}"
    if name == "prefill":
        return f"{limits['gemm_gflop_per_s'] * 1e9 / num_bytes:.0f}"  # 2 flops for each weight of 2 bytes
    return "-"
