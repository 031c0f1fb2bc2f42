"""Runs one engine in this process: prepares its files, answers the check, or measures all workloads.

    python benchmarks/peers/worker.py '{"task": "measure", "variant": "ours", "folder": ..., "threads": 2, ...}'

The last line of stdout is JSON. `measure` has the start-up time, memory, and samples by workload.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from adapters import LOADERS, PREPARATIONS
from correctness import NUM_NEW, check_prompt
from load import memory_mb
from variants import VARIANTS
from workloads import WORKLOADS, Ask, first_token


def main(task: dict[str, Any]) -> dict[str, Any]:
    variant, folder = VARIANTS[task["variant"]], Path(task["folder"])
    if task["task"] == "prepare":
        PREPARATIONS[variant.engine](folder, variant.form)
        return {}
    complete = LOADERS[variant.engine](folder, variant, task["threads"])
    if task["task"] == "check":
        return {"tokens": complete([Ask(check_prompt(), NUM_NEW)])[0]}
    result: dict[str, Any] = {"startup_s": first_token(complete) - task["started"], "resident_mb": memory_mb("VmRSS")}
    until = time.perf_counter() + task["seconds"]
    samples = {}
    for name in task["workloads"]:
        if name not in variant.skipped:
            samples[name] = [list(one) for one in WORKLOADS[name].samples(complete, task["round"], until)]
    return {**result, "peak_mb": memory_mb("VmHWM"), "samples": samples}


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
