"""Times `sagellm generate` in a copy of the repository: fresh processes, with their start and all checks.

python benchmarks/generate.py [--runs N]

cold: into an empty folder. one op: after a change of the equations of silu_mul, which other ops fuse. norms: after one
of all RMS norms. unchanged: after no change. check: `--check`, which generates from scratch.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("_dev", "codegen", "generated", "runtime", "specs", "templates")


class Copy:
    """A copy of the package's folders; edits of its specs are taken back by the next call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FOLDERS:
            shutil.copytree(REPO / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns(".cache"))

    def toggle(self, file: str, old: str, new: str) -> None:
        """Replaces every `old` by `new`, or the other way round."""
        path = self.folder / "specs" / file
        text = path.read_text(encoding="utf-8")
        changed = text.replace(new, old) if new in text else text.replace(old, new)
        assert changed != text, "the op that this benchmark edits has changed; edit another"
        path.write_text(changed, encoding="utf-8")

    def generate(self, *arguments: str) -> float:
        """Runs the command and returns its seconds."""
        env = os.environ | {"PYTHONPATH": str(self.folder / "_dev"), "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-m", "sageLLM.runtime.cli.entry", "generate", *arguments]
        start = time.perf_counter()
        subprocess.run(command, check=True, env=env, cwd=self.folder, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    for name, value in measure(parser.parse_args().runs).items():
        print(f"{name:<40} {value}")


def measure(runs: int) -> dict[str, Any]:
    """Medians in seconds; the cases take turns."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        edits: dict[str, Callable[[], None]] = {
            "generate_one_op_s": lambda: copy.toggle("ops/activation.yaml", "* sigmoid(g)", "* sigmoid(g) * 1.0"),
            "generate_norms_s": lambda: copy.toggle("ops/norm.yaml", "rsqrt(ms + eps)", "rsqrt(eps + ms)"),
            "generate_unchanged_s": lambda: None,
        }
        copy.generate()  # compiles the modules
        seconds: dict[str, list[float]] = {name: [] for name in ("generate_cold_s", *edits, "generate_check_s")}
        for number in range(runs):
            seconds["generate_cold_s"].append(copy.generate("--out", f"fresh_{number}"))
            for name, edit in edits.items():
                edit()
                seconds[name].append(copy.generate())
            seconds["generate_check_s"].append(copy.generate("--check"))
    return {name: round(statistics.median(found), 3) for name, found in seconds.items()}


if __name__ == "__main__":
    main()
