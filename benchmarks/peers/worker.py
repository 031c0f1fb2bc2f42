"""Measures one engine on one workload in this process, a new one for every figure.

    python benchmarks/peers/worker.py PEER WORKLOAD CHECKPOINT THREADS

The last line of stdout is JSON: the figure, the time of the first token, the resident memory in MB.
"""

import json
import sys
from pathlib import Path

from adapters import LOADERS, PREPARATIONS
from workloads import WORKLOADS, first_token


def main(peer: str, workload: str, folder: Path, threads: int) -> None:
    if workload == "prepare":
        PREPARATIONS[peer](folder)
        print(json.dumps({}))
        return
    complete = LOADERS[peer](folder, threads)
    loaded_mb = _resident_mb()
    when = first_token(complete)
    result = {"first_token_time": when, "loaded_mb": loaded_mb, "resident_mb": _resident_mb()}
    if workload != "startup":
        result["figure"] = WORKLOADS[workload](complete)
    print(json.dumps(result))


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
