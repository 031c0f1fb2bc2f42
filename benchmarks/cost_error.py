"""Compares times of whole steps with those that measured hardware entries predict, for two shapes and tp 1 and 2.

    python benchmarks/cost_error.py [--shapes 135m,0.6b] [--tp 1,2] [--cache FOLDER] [--out FILE.json]

Measures an entry of this machine for each degree (`sagellm bench hardware`), then the steps of each shape
(`sagellm bench steps`). Checkpoints are random, made once with transformers. Takes about six minutes. Two ranks do not
divide the 9 heads of 135m: there its layers have 8 query and 4 key heads of the same width.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import machine_facts

sys.path.append(str(Path(__file__).resolve().parent / "peers"))
from shapes import SHAPES, checkpoint

HEADS_FOR_TWO = {"135m": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,0.6b", help=f"of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--tp", default="1,2", help="tensor-parallel degrees")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind of step")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    found = {tp: measure(options.shapes.split(","), int(tp), options) for tp in options.tp.split(",")}
    for tp, one in found.items():
        for shape, steps in one["steps"].items():
            print(f"\n{shape}, tp {tp}")
            for step in steps:
                print(
                    f"{step['step']:32}{step['measured_ms']:>10.2f}{step['predicted_ms']:>10.2f}{step['error']:>+8.0%}"
                )
    largest = max(abs(step["error"]) for one in found.values() for steps in one["steps"].values() for step in steps)
    print(f"\nlargest error {largest:.0%}")
    if options.out:
        text = json.dumps({"machine": machine_facts(), "largest_error": largest, "tp": found}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


def measure(shapes: list[str], tp: int, options: argparse.Namespace) -> dict[str, Any]:
    """Limits of a rank, and measured and predicted steps by shape."""
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder) / "machine.yaml"
        limits = sagellm("hardware", "--out", str(entry), "--tensor-parallel-size", str(tp))
        steps = {}
        for name in shapes:
            model = str(folder_of(name, tp, options.cache))
            degree, rounds = ("--tensor-parallel-size", str(tp)), ("--rounds", str(options.rounds))
            steps[name] = sagellm("steps", "--model", model, "--hardware", str(entry), *degree, *rounds)
        return {"limits": limits, "entry": entry.read_text(encoding="utf-8"), "steps": steps}


def folder_of(name: str, tp: int, cache: Path) -> Path:
    """The checkpoint of a shape, with other heads where the ranks do not divide its own."""
    if tp == 1 or name not in HEADS_FOR_TWO:
        return checkpoint(name, cache)
    shape = SHAPES[name]
    SHAPES[f"{name}-tp"] = replace(shape, sizes=shape.sizes | HEADS_FOR_TWO[name])
    return checkpoint(f"{name}-tp", cache)


def sagellm(command: str, *arguments: str) -> Any:
    """The JSON that `sagellm bench COMMAND` prints."""
    line = [sys.executable, "-m", "sageLLM.runtime.cli.main", "bench", command, *arguments, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
