"""Dry run of benchmarks/gpu.py without a GPU: the same calls in the interpreter, on tiny sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = pytest.mark.timeout(900)  # on a busy machine

SCRIPT = Path(__file__).parents[3] / "benchmarks/gpu.py"


def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--dry-run", "--skip", "engine", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["checks"]["failed"] == [] and report["checks"]["checked"] > 0
    times = [row["us"] for row in report["kernels"].values() if isinstance(row, dict)]
    assert len(times) >= 9 and min(times) > 0
