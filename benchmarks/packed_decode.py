"""Compares the decode rates of weights in bf16, int8 and int4, with the rate at which the machine reads memory.

    python benchmarks/packed_decode.py [--shapes 135m,0.6b] [--forms bf16,int8,int4-g64] [--rounds 3] [--tokens 48]

Every figure is of a new process, and forms alternate: one request with a prompt of 8 tokens, the median time of its
decode steps, the best of all rounds. `bytes` are those of the weights that a step reads, `read` is the rate of a plain
read in the same process, and `of bound` the bytes over the time at that rate.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="135m,0.6b")
    parser.add_argument("--forms", default="bf16,int8,int4-g64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "sagellm-start-up"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(decode(args.child, args.tokens)))
        return
    print(f"{'':16}{'tok/s':>8}{'of bf16':>9}{'MB':>8}{'GB/s':>8}{'read':>8}{'of bound':>10}")
    for shape in args.shapes.split(","):
        compare(shape, args)


def compare(shape: str, args: argparse.Namespace) -> None:
    """Prints the rows of a shape."""
    forms = args.forms.split(",")
    folders = {form: quantised(shape, form, args.cache) for form in forms}
    best: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for form, folder in folders.items():
            row = run(folder, args.tokens)
            if form not in best or row["seconds"] < best[form]["seconds"]:
                best[form] = row
    for form, row in best.items():
        rate = row["bytes"] / row["seconds"]
        ratio = best[forms[0]]["seconds"] / row["seconds"]
        print(
            f"{shape + ' ' + form:16}{1 / row['seconds']:8.1f}{ratio:9.2f}{row['bytes'] / 1e6:8.0f}"
            f"{rate / 1e9:8.1f}{row['read'] / 1e9:8.1f}{rate / row['read']:10.2f}"
        )


def quantised(shape: str, form: str, cache: Path) -> Path:
    """The checkpoint of a shape, or its copy in a form, made once and kept."""
    sys.path.insert(0, str(HERE / "peers"))
    from shapes import checkpoint

    from sageLLM.runtime.quantize.checkpoint import quantize_checkpoint
    from sageLLM.runtime.quantize.scheme import Scheme
    from sageLLM.runtime.registry.plugins import load_registry

    source: Path = checkpoint(shape, cache)
    out = source.with_name(f"{source.name}-{form}")
    if form == "bf16":
        return source
    if not out.exists():
        registry = load_registry()
        quantize_checkpoint(source, out, Scheme.parse(form, registry.methods), registry)
    return out


def run(folder: Path, tokens: int) -> dict[str, float]:
    """The figures of one new process."""
    command = [sys.executable, __file__, "--child", str(folder), "--tokens", str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def decode(folder: Path, tokens: int) -> dict[str, float]:
    """The figures of this process."""
    import statistics
    import time

    from sageLLM import LLM, SamplingParams
    from sageLLM.runtime.bench.machine import this_machine

    llm: Any = LLM(folder, skip_tokenizer=True, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    times: list[float] = []
    for _ in llm.stream([list(range(1, 9))], params):
        times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times[4:])]
    read = this_machine().memory_bandwidth
    num_bytes = sum(one.num_bytes for one in llm.weight_stats())
    return {"seconds": statistics.median(steps), "bytes": float(num_bytes), "read": float(read)}


if __name__ == "__main__":
    main()
