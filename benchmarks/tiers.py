"""Measures decoding with weights and KV below the device: tokens per second, and the part of the io that is hidden.

    python benchmarks/tiers.py [--shape 135m] [--requests 8] [--prompt 512] [--tokens 32] [--rounds 3]

Rows: all in memory; weights on disk, all layers and half of them streamed; the KV of three quarters of the requests on
the host and on disk. The rows alternate, and the medians over the rounds are printed, with ratios to the first row. The
checkpoint has random weights of the shape, and is kept in --cache, next to the packed weights.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.shapes import SHAPES, checkpoint

from sageLLM import LLM, SamplingParams

GIB = 2**30
BLOCK_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    options = parser.parse_args()
    model = checkpoint(options.shape, options.cache)
    llms = load_all(model, options)
    speeds: dict[str, list[float]] = {name: [] for name in llms}
    for _ in range(options.rounds):
        for name, llm in llms.items():
            speeds[name].append(decode_speed(llm, options))
    resident = statistics.median(next(iter(speeds.values())))
    print(f"{'':<28} {'tokens/s':>9} {'ratio':>6} {'io ms/step':>11} {'hidden':>7} {'planned':>8}")
    for name, llm in llms.items():
        speed = statistics.median(speeds[name])
        print(f"{name:<28} {speed:>9.1f} {speed / resident:>6.2f} {_io(llm)}")


def load_all(model: Path, options: argparse.Namespace) -> dict[str, LLM]:
    """An engine for each row."""
    blocks = options.requests * -(-(options.prompt + options.tokens) // BLOCK_SIZE)
    resident = load(model, blocks, options)
    whole = load(model, blocks, options, weights_tier="disk").compiler.weight_stream
    half = (whole.kept_bytes + whole.staging_bytes * (2 + whole.num_layers // 2)) / GIB
    quarter = blocks // 4
    space = resident.kv_cache_size.block_bytes * (blocks + 8) / GIB
    return {
        "resident": resident,
        "weights on disk": load(model, blocks, options, weights_tier="disk"),
        "half of the layers on disk": load(model, blocks, options, weights_tier="disk", weights_budget=half),
        "3/4 of the KV on the host": load(model, quarter, options, kv_tier="host", kv_tier_space=space),
        "3/4 of the KV on disk": load(model, quarter, options, kv_tier="disk", kv_tier_space=space),
    }


def load(model: Path, num_kv_blocks: int, options: argparse.Namespace, **tiers: Any) -> LLM:
    if tiers.get("weights_tier") == "disk":
        tiers["weights_folder"] = options.cache / "packed"
    if tiers.get("kv_tier") == "disk":
        tiers["disk_folder"] = options.cache
    length = options.prompt + options.tokens + 1
    return LLM(
        model,
        skip_tokenizer=True,
        max_model_len=length,
        num_kv_blocks=num_kv_blocks,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        **tiers,
    )


def decode_speed(llm: LLM, options: argparse.Namespace) -> float:
    """Output tokens per second while all requests decode."""
    params = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    for i in range(options.requests):
        llm.engine.add(str(i), None, [5 + i, *range(7, 6 + options.prompt)], params)
    while llm.engine.scheduler.get_stats()["decode_queue_size"] < options.requests:
        llm.engine.step(only_finished=True)
    begin, before = time.perf_counter(), llm.engine.scheduler.get_stats()["total_decode_tokens"]
    while llm.engine.has_work:
        llm.engine.step(only_finished=True)
    num_tokens = llm.engine.scheduler.get_stats()["total_decode_tokens"] - before
    return float(num_tokens / (time.perf_counter() - begin))


def _io(llm: LLM) -> str:
    """The io of the decode steps."""
    reports = [report for report in llm.io_stats() if "_decode" in report.graph]
    if not reports:
        return f"{'':>11} {'':>7} {'':>8}"
    (report,) = reports
    planned = "" if report.planned is None else f"{report.planned.hidden_fraction:.0%}"
    per_step = 1e3 * report.total.io_s / report.num_steps
    return f"{per_step:>11.2f} {report.total.hidden_fraction:>7.0%} {planned:>8}"


if __name__ == "__main__":
    main()
