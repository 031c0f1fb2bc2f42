"""Measures the graph of a tensor-parallel rank: the ranks run as processes that share memory for their collectives.

    python -m sageLLM.runtime.inspect.measure_ranks FILE RANK NUM_RANKS PLUGIN...

is one rank: FILE is the descriptor of the shared memory, stdin has the graph as JSON, and stdout gets the measurement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from sageLLM.generated.ops.op_types import OpType
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.json_form import from_json, to_json
from sageLLM.runtime.core.ir.order import Span
from sageLLM.runtime.inspect.measure import Measurement, measure
from sageLLM.runtime.kernels.cpu.communicator import make_shared_memory, open_communicator
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.registry.plugins import load_registry

LIMIT = 300.0  # seconds, most of them to compile kernels
POLL = 0.05


def measure_ranks(graph: ExecutionGraph, num_ranks: int, plugins: Sequence[Path] = ()) -> Measurement:
    """The measurement of rank 0 while all ranks run the graph. Raises ValueError if a rank fails or hangs."""
    memory = make_shared_memory(num_ranks)
    try:
        ranks = [_start(memory, rank, num_ranks, plugins) for rank in range(num_ranks)]
    finally:
        os.close(memory)
    outputs: dict[int, tuple[str, str]] = {}
    text = to_json(graph)
    # A thread per rank: each waits for its input and writes its output while others do.
    threads = [
        threading.Thread(target=lambda i=i, rank=rank: outputs.update({i: rank.communicate(text)}))
        for i, rank in enumerate(ranks)
    ]
    for thread in threads:
        thread.start()
    _wait(ranks)
    for thread in threads:
        thread.join()
    for number, rank in enumerate(ranks):
        if rank.returncode:
            reason = outputs[number][1].strip().splitlines()[-1:] or [f"exit code {rank.returncode}"]
            raise ValueError(f"rank {number} of {num_ranks} could not be measured: {reason[0]}")
    found = json.loads(outputs[0][0])
    return Measurement(found["kernels"], {node_id: Span(*span) for node_id, span in found["spans"].items()})


def _start(memory: int, rank: int, num_ranks: int, plugins: Sequence[Path]) -> subprocess.Popen[str]:
    module = "sageLLM.runtime.inspect.measure_ranks"
    command = [sys.executable, "-m", module, str(memory), str(rank), str(num_ranks), *map(str, plugins)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, pass_fds=[memory], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def _wait(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """Waits for the end of all ranks; a failed or late one ends all, since the others wait for it in a collective."""
    deadline = time.monotonic() + LIMIT
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
            for rank in ranks:
                rank.kill()
            return
        time.sleep(POLL)


def main() -> None:
    memory, rank, num_ranks = (int(text) for text in sys.argv[1:4])
    parent = os.getppid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    registry = load_registry([Path(text) for text in sys.argv[4:]])
    graph = from_json(sys.stdin.read(), OpType, registry.ops)
    open_communicator(memory, rank, num_ranks, find_compiler())
    found = measure(graph, registry)
    print(json.dumps({"kernels": found.kernels, "spans": found.spans}))


def _end_with(parent: int) -> None:
    """Ends the process when its parent has died, also in the middle of a collective."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)


if __name__ == "__main__":
    main()
