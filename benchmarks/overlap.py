"""Compares steps of two tensor-parallel ranks with collectives next to computation and with collectives in turn.

    python benchmarks/overlap.py [--shapes 135m] [--rounds 5] [--threads 1] [--cache FOLDER] [--out FILE.json]

Tokens per second of a decode of 16 requests and of a prefill of 1024 tokens, whole and in two micro-batches, with
`overlap_transfers` and without, in rounds that alternate; the ratio is the median over the rounds. Each rank has
`--threads` threads for computation, and with the overlap one more for its collectives: the ratio is of use only on a
machine with an idle core for each of these threads. Checkpoints are random, made once with transformers.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from cost_error import folder_of
from machine import machine_facts
from parallel import decode, prefill
from peers.shapes import SHAPES

from sageLLM import LLM

RUNS = {"decode, 16 requests": decode(16), "prefill of 1024": prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # the worker processes inherit it
    print(f"{'':44}{'in turn':>10}{'overlap':>10}{'ratio':>8}")
    rows = []
    for shape in options.shapes.split(","):
        for num_ubatches in (1, 2):
            rows += measure(shape, folder_of(shape, 2, options.cache), num_ubatches, options.rounds)
    if options.out:
        text = json.dumps({"machine": machine_facts(), "threads": options.threads, "rows": rows}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


def measure(shape: str, folder: Path, num_ubatches: int, rounds: int) -> list[dict[str, Any]]:
    """Prints and returns a row for each kind of work."""
    models = [load(folder, num_ubatches, overlap=overlap) for overlap in (False, True)]
    try:
        rows = []
        for name, run in RUNS.items():
            for llm in models:
                run(llm)  # plans its steps
            rates = [[run(llm) for llm in models] for _ in range(rounds)]
            in_turn, overlap = (statistics.median(one[i] for one in rates) for i in range(2))
            ratio = statistics.median(one[1] / one[0] for one in rates)
            what = f"{shape}, {num_ubatches} micro-batches, {name}"
            print(f"{what:<44}{in_turn:>10.1f}{overlap:>10.1f}{ratio:>8.2f}", flush=True)
            rows.append({"work": what, "in_turn": in_turn, "overlap": overlap, "ratio": ratio})
        return rows
    finally:
        for llm in models:
            llm.close()


def load(folder: Path, num_ubatches: int, *, overlap: bool) -> LLM:
    return LLM(
        folder,
        skip_tokenizer=True,
        max_model_len=2048,
        enable_prefix_caching=False,
        tensor_parallel_size=2,
        num_ubatches=num_ubatches,
        overlap_transfers=overlap,
    )


if __name__ == "__main__":
    main()
