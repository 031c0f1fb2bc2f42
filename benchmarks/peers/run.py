"""Compares sageLLM with other engines on this machine: one fixed workload, fresh processes in turn, medians and ratios.

    python benchmarks/peers/run.py [--shapes 135m,0.6b] [--peers ours,transformers,...] [--pairs 3] [--out FILE.json]

transformers is always compared. llama.cpp (llama-cpp-python, gguf) and openvino (openvino-genai, optimum-intel) are
compared if `--peer-python` has them installed, by default the Python that runs this. Checkpoints are random and kept in
`--cache`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters import MODULES
from shapes import SHAPES, checkpoint, num_weight_bytes
from table import print_table
from workloads import WORKLOADS

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

Figures = dict[str, dict[str, list[float]]]
"""By workload and peer, a figure for every round."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Workloads and repetitions of a comparison; `pythons` contains the interpreter of each peer."""

    pythons: dict[str, str]
    threads: int
    pairs: int
    workloads: list[str] = field(default_factory=lambda: list(WORKLOADS))

    def measure(self, folder: Path) -> dict[str, Any]:
        """All figures of one shape, with the machine's limits before and after."""
        for peer in self.pythons:
            self._worker(peer, "prepare", folder)
        rooflines = [self._roofline()]
        figures: Figures = {}
        for workload in self.workloads:
            for _ in range(self.pairs):
                for peer in self.pythons:
                    for name, value in self._figures(peer, workload, folder).items():
                        figures.setdefault(name, {}).setdefault(peer, []).append(value)
        rooflines.append(self._roofline())
        limits = {name: statistics.mean(one[name] for one in rooflines) for name in rooflines[0]}
        return {"weight_bytes": num_weight_bytes(folder), "limits": limits, "figures": figures}

    def _figures(self, peer: str, workload: str, folder: Path) -> dict[str, float]:
        start = time.time()
        result = self._worker(peer, workload, folder)
        found = {"startup_s": result["first_token_time"] - start, "loaded_mb": result["loaded_mb"]}
        if "figure" in result:
            found[workload] = result["figure"]
        print(f"{folder.name} {peer:<13} {workload:<9} {result.get('figure', 0):8.1f}", file=sys.stderr)
        return found

    def _worker(self, peer: str, workload: str, folder: Path) -> dict[str, Any]:
        return self._run(self.pythons[peer], "worker.py", peer, workload, str(folder), str(self.threads))

    def _roofline(self) -> dict[str, float]:
        return self._run(sys.executable, "roofline.py", str(self.threads))

    def _run(self, python: str, script: str, *arguments: str) -> dict[str, Any]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        command = [python, str(HERE / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m", help=f"of {', '.join(SHAPES)}, by commas")
    parser.add_argument(
        "--peers", default=",".join(MODULES), help="by commas; those that are not installed are left out"
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="by commas; 'startup' alone is one, too")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of fresh processes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the other engines")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    pythons = _pythons(options.peers.split(","), options.peer_python)
    comparison = Comparison(pythons, options.threads, options.pairs, options.workloads.split(","))
    results = {name: comparison.measure(checkpoint(name, options.cache)) for name in options.shapes.split(",")}
    for name, result in results.items():
        print_table(name, result)
    if options.out:
        from machine import machine_facts

        facts = {**machine_facts(), "threads": options.threads}
        options.out.write_text(json.dumps({"machine": facts, "shapes": results}, indent=1) + "\n", encoding="utf-8")


def _pythons(peers: list[str], peer_python: str) -> dict[str, str]:
    """The peers that are installed, each with the interpreter that has it."""
    found = {}
    for peer in peers:
        python = sys.executable if peer in ("ours", "transformers") else peer_python
        check = f"import importlib.util as u, sys; sys.exit(u.find_spec({MODULES[peer]!r}) is None)"
        if subprocess.run([python, "-c", check]).returncode == 0:
            found[peer] = python
        else:
            print(f"{peer} is not installed and left out", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
