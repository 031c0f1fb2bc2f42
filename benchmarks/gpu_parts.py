"""Process of a part of `gpu.py`: python gpu_parts.py PART --rows FILE [--dry-run]."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "_dev"), str(ROOT / "tests/kernels/triton"), str(ROOT / "benchmarks")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args(arguments)
    os.environ["SAGELLM_CHECK_DEVICE"] = "cpu" if chosen.dry_run else "cuda"
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        from sageLLM.runtime.kernels.triton_interpreter import patch_interpreter

        patch_interpreter()
    import torch
    from gpu_table import Table

    device = torch.device("cpu" if chosen.dry_run else "cuda")
    for name in chosen.parts:
        table = Table(name, chosen.rows, device)
        if name == "ceilings":
            table.add("machine", machine)
        part_of(name)(table)


def part_of(name: str) -> Callable[[Any], None]:
    import gpu_engine
    import gpu_kernels

    if name == "checks":
        return check
    part: Callable[[Any], None] = getattr(gpu_engine if name in ("engine", "ranks") else gpu_kernels, name)
    return part


def machine() -> dict[str, Any]:
    import torch
    import triton
    from machine import machine_facts

    facts: dict[str, Any] = {"gpus": torch.cuda.device_count()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30), "sms": gpu.multi_processor_count}
        facts["clock_mhz"] = attempted_clock()
    return {**machine_facts(), **facts, "triton": triton.__version__, "cuda": torch.version.cuda}


def attempted_clock() -> int | None:
    """The clock of the processors, if NVML is installed."""
    import torch

    try:
        return torch.cuda.clock_rate()
    except Exception:
        return None


def check(table: Any) -> None:
    """A row for each check that fails, and one with the number of checks."""
    import checks

    found = checks.batch_invariance_findings() if table.is_dry else checks.findings()
    count = 0
    for one in found:
        count += 1
        if one.wrong or one.error > 1:
            facts = {"error": f"{one.error:.2f} {one.wrong}"}
            table.add(f"{one.op} {one.kind} {one.dtype}", lambda facts=facts: facts)
    table.add("checked", lambda: {"count": count})


if __name__ == "__main__":
    main()
