"""Checks and times the Triton kernels and the engine on the local GPUs; ends by itself within 9.5 minutes.

    python benchmarks/gpu.py --out out.json               on a machine with one or more GPUs
    python benchmarks/gpu.py --parts decode linear        some parts, in this order
    python benchmarks/gpu.py --cache FOLDER               with a Triton cache that was filled elsewhere
    python benchmarks/gpu.py --dry-run                    without a GPU: in Triton's interpreter, on tiny sizes

Each part is a process with a time limit, because an illegal access ends the process that made it. A row is written to
OUT.rows as soon as it is measured, and OUT is written after each part. With several GPUs the parts are divided among
them. Requires torch, triton, numpy, safetensors and tokenizers; peers that are not installed are reported as errors.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("gpu_parts.py")
SECONDS = 570.0
"""The time of the whole run."""
LIMITS = {
    "ceilings": 60, "launchers": 150, "decode": 100, "linear": 100, "prefill": 90, "others": 90, "engine": 150,
    "ranks": 90, "checks": 180,
}  # fmt: skip
"""Seconds of each part at most on a GPU, in the order of their value: what comes late may be cut off."""


@dataclass(frozen=True, slots=True)
class Part:
    """A command that appends its rows to a file; one that uses all devices runs alone, after the others."""

    name: str
    command: Sequence[str]
    limit: float
    uses_all: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="run in the interpreter, on tiny sizes")
    parser.add_argument("--parts", nargs="*", default=[*LIMITS], choices=[*LIMITS], metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the file of the figures (gpu.json)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time of the whole run")
    parser.add_argument("--cache", type=Path, help="folder of Triton's compiled kernels")
    arguments = parser.parse_args()
    rows = arguments.out.with_suffix(".rows")
    rows.unlink(missing_ok=True)
    extra, limits = ([], LIMITS) if not arguments.dry_run else (["--dry-run"], dict.fromkeys(LIMITS, arguments.seconds))
    parts = [
        Part(name, [sys.executable, str(CHILD), name, "--rows", str(rows), *extra], limits[name], name == "ranks")
        for name in arguments.parts
    ]
    environ = {"PYTHONPATH": str(ROOT / "_dev")}
    if arguments.cache:
        environ["TRITON_CACHE_DIR"] = str(arguments.cache.resolve())
    devices = [None] if arguments.dry_run else visible_devices()
    run_parts(parts, devices, arguments.out, rows, arguments.seconds, environ)


def visible_devices() -> list[str | None]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return [*named.split(",")][:count] if named else [str(i) for i in range(count)] or [None]


def run_parts(
    parts: Sequence[Part],
    devices: Sequence[str | None],
    out: Path,
    rows: Path,
    seconds: float,
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Runs the parts in order, one at a time on each device, and returns what was written to `out`."""
    end = time.monotonic() + seconds
    free: SimpleQueue[str | None] = SimpleQueue()
    for device in devices:
        free.put(device)
    report: dict[str, Any] = {"parts": {}, "rows": []}

    def run(part: Part) -> None:
        device = free.get()
        own = {} if device is None or part.uses_all else {"CUDA_VISIBLE_DEVICES": device}
        report["parts"][part.name] = run_part(part, {**environ, **own}, end)
        free.put(device)
        with rows.open("a") as file:
            file.write("\n")  # ends the line that a killed part may have begun
        report["rows"] = read_rows(rows)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(part.name, json.dumps(report["parts"][part.name]), flush=True)

    with ThreadPoolExecutor(len(devices)) as pool:
        list(pool.map(run, (part for part in parts if not part.uses_all)))
    for part in parts:
        if part.uses_all:
            run(part)
    return report


def run_part(part: Part, environ: Mapping[str, str], end: float) -> dict[str, Any]:
    """Runs a part within its limit and the time that is left: its seconds, and how it ended."""
    start = time.monotonic()
    limit = min(part.limit, end - start)
    if limit <= 1:
        return {"seconds": 0.0, "ended": "not run: no time was left"}
    with tempfile.TemporaryFile() as errors:  # a pipe would stay open in compilers that the part leaves behind
        process = subprocess.Popen(part.command, env={**os.environ, **environ}, stderr=errors, start_new_session=True)
        try:
            status = process.wait(limit)
            ended = "complete" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
                process.wait(10)
            ended = f"stopped after {limit:.0f} s"
        found = {"seconds": round(time.monotonic() - start, 1), "ended": ended}
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    return found if ended == "complete" else {**found, "stderr": text[-2000:]}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far; the last line of a process that was killed may be cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


if __name__ == "__main__":
    main()
