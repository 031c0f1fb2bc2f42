"""Runs every benchmark of this folder and writes the figures, with the machine's facts, to one JSON file.

python benchmarks/run_all.py [--out benchmarks/results/NAME.json]
"""

import argparse
import json
from pathlib import Path

import block_passes
import engine_overhead
import generate
import graphs
import passes
import scheduler
import spec_lines
from machine import machine_facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as well")
    out = parser.parse_args().out
    figures = {
        "generate": generate.measure(runs=5),
        "graphs": graphs.measure(runs=9),
        "passes": passes.measure(runs=9),
        "block_passes": block_passes.measure(runs=7),
        "engine": engine_overhead.measure(steps=100),
        "scheduler": scheduler.measure(steps=500),
        "specs": spec_lines.measure(),
    }
    text = json.dumps({"machine": machine_facts(), "figures": figures}, indent=1)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
