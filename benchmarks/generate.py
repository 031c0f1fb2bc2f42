"""Times `sagellm generate`, each run in a fresh process: from nothing, and after one op's entry changed.

python benchmarks/generate.py [--runs N]
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RUN = (
    "import sys, pathlib, sageLLM.codegen.driver as driver;"
    "driver.generate(out=pathlib.Path(sys.argv[1]), base=pathlib.Path(sys.argv[2]))"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    for name, value in measure(parser.parse_args().runs).items():
        print(f"{name:<40} {value}")


def measure(runs: int) -> dict[str, Any]:
    """Medians in seconds, process start included."""
    cold, warm = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            out, specs = Path(folder, "out"), Path(folder, "specs")
            shutil.copytree(REPO / "specs", specs)
            cold.append(_generate(out, specs))
            _change_one_op(specs)
            warm.append(_generate(out, specs))
    return {
        "generate_cold_s": round(statistics.median(cold), 3),
        "generate_one_op_s": round(statistics.median(warm), 3),
    }


def _generate(out: Path, specs: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, str(out), str(specs)], check=True)
    return time.perf_counter() - start


def _change_one_op(specs: Path) -> None:
    path = specs / "ops" / "activation.yaml"
    text = path.read_text(encoding="utf-8")
    changed = text.replace("* sigmoid(g)", "* sigmoid(g) * 1.0", 1)
    assert changed != text, "the op that this benchmark edits has changed; edit another"
    path.write_text(changed, encoding="utf-8")


if __name__ == "__main__":
    main()
