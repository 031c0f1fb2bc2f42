"""Measures the CPU engine's goals, as ratios of its times, and makes the table of all goals.

    python benchmarks/goals/run.py [--parts hybrid,reads,...] [--shapes 135m,0.6b] [--no-wait] [--out FILE]
    python benchmarks/goals/run.py --table [--publish]     # of benchmarks/results/goals.json, without measuring

Each part is a fresh process (`measure.py`), which waits until others use at most 0.15 cores for a second; `--no-wait`
measures on a busy machine, and marks the result. All parts take about four minutes. Ratios to other engines come from
`benchmarks/peers/run.py`, whose results the table shows too.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "peers")]
import measure  # noqa: E402
import page  # noqa: E402

PARTS = ("hybrid", "first_prefill", "reads", "profile", "float_attention", "start_up", "first_start")
START_SHAPE = "135m"
"""The shape of the parts about starting."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas")
    parser.add_argument("--shapes", default="135m,0.6b", help="separated by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    parser.add_argument("--no-wait", action="store_true", help="measure on a busy machine; the result is marked")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON, next to those of other parts there")
    parser.add_argument("--table", action="store_true", help="print the table of benchmarks/results/goals.json")
    parser.add_argument("--publish", action="store_true", help="write that table into docs/benchmarks.md")
    parser.add_argument("--child", nargs=2, metavar=("PART", "SHAPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(figures_of(*options.child, options.cache)))
    elif options.table or options.publish:
        page.show(publish=options.publish)
    else:
        measured(options)


def measured(options: argparse.Namespace) -> None:
    """Runs the parts, and prints and writes the figures of each as soon as it has ended."""
    from load import MAX_FOREIGN, LoadTimes, wait_until_quiet
    from machine import machine_facts

    found: dict[str, Any] = {"machine": {}, "parts": {}}
    if options.out and options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
    found["machine"] = {**machine_facts(), "threads": options.threads}
    for part in options.parts.split(","):
        for shape in shapes_of(part, options.shapes.split(",")):
            if not options.no_wait:
                wait_until_quiet()
            start = LoadTimes.now()
            figures = run(part, shape, options)
            foreign = LoadTimes.now().foreign_since(start)
            is_quiet = not options.no_wait and foreign <= MAX_FOREIGN
            found["parts"].setdefault(part, {})[shape] = {**figures, "is_quiet": is_quiet}
            print(f"{part} {shape}: {json.dumps(figures)}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shapes_of(part: str, shapes: list[str]) -> list[str]:
    """The shapes that a part is measured for: one without a model has none of its own."""
    if part in ("start_up", "first_start"):
        return [START_SHAPE]
    return shapes if inspect.signature(getattr(measure, part)).parameters.get("folder") else ["any"]


def run(part: str, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one new process."""
    command = [sys.executable, __file__, "--child", part, shape, "--cache", str(options.cache)]
    threads = "1" if part == "float_attention" else str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def figures_of(part: str, shape: str, cache: Path) -> dict[str, Any]:
    """The figures of this process."""
    from shapes import SHAPES, checkpoint

    function = getattr(measure, part)
    figures: dict[str, Any] = function(checkpoint(shape, cache)) if shape in SHAPES else function()
    return figures


if __name__ == "__main__":
    main()
