"""Measures how long a process takes from its start to the first token, and its memory.

    python benchmarks/start_up.py [--runs N] [--cache FOLDER] [--model FOLDER_OR_FILE] [--weights-tier mapped]

Every run is a new process that imports the engine, loads a random bfloat16 checkpoint of the shape of SmolLM-135M, or
another one, and answers a prompt of 8 tokens; the kernels are compiled before the first run, and a file of weights is
made. Times are medians in seconds; memory is in
MB, above that of Python with torch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIGURES = ("import torch", "import", "load", "first token", "total", "weights MB", "resident MB", "peak MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "sagellm-start-up"))
    parser.add_argument("--model", type=Path, help="a checkpoint folder or a GGUF file instead")
    parser.add_argument("--weights-tier", default="device")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(start(Path(args.child), weights_tier=args.weights_tier)))
        return
    sys.path.insert(0, str(HERE / "peers"))
    from shapes import checkpoint

    folder, options = args.model or checkpoint("135m", args.cache), ["--weights-tier", args.weights_tier]
    run(folder, options)  # compiles the kernels and the bytecode
    rows = [run(folder, options) for _ in range(args.runs)]
    for name in FIGURES:
        print(f"{name:<14} {statistics.median(row[name] for row in rows):8.2f}")


def run(folder: Path, options: Sequence[str] = ()) -> dict[str, float]:
    """The figures of one new process."""
    command = [sys.executable, __file__, "--child", str(folder), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def start(folder: Path, **options: Any) -> dict[str, float]:
    """The figures of this process; `options` are those of LLM."""
    import time

    times = [time.perf_counter()]
    import torch  # noqa: F401

    times.append(time.perf_counter())
    from sageLLM import LLM, SamplingParams

    times.append(time.perf_counter())
    before = memory_mb("VmRSS")
    llm = LLM(folder, skip_tokenizer=True, enable_prefix_caching=False, **options)
    times.append(time.perf_counter())
    llm.generate([list(range(1, 9))], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    times.append(time.perf_counter())
    steps = [after - earlier for earlier, after in pairwise(times)]
    files = folder.glob("*.safetensors") if folder.is_dir() else [folder]
    weights = sum(file.stat().st_size for file in files) / 1e6
    memory = (weights, memory_mb("VmRSS") - before, memory_mb("VmHWM") - before)
    return dict(zip(FIGURES, (*steps, sum(steps), *memory), strict=True))


def memory_mb(field: str) -> float:
    """A figure of this process in megabytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
