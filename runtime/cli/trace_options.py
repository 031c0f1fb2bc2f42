"""The trace that the arguments of a command ask for."""

import sys
from pathlib import Path

from sageLLM.runtime.cli.simulate_request import TraceOptions
from sageLLM.runtime.sim.trace import Lengths, SkippedRows, TraceRequest, at_rate, read_trace, synthetic

MAX_SEQ_LEN = 2**20


def requested_trace(request: TraceOptions) -> list[TraceRequest]:
    """The first requests of the trace, at their original times or at the requested rate."""
    if request.trace is None:
        if request.rate is None or request.num_requests is None:
            raise ValueError("pass --trace, or --rate and --num-requests to generate one")
        prompt, output = Lengths(*request.prompt, MAX_SEQ_LEN), Lengths(*request.output, MAX_SEQ_LEN)
        return synthetic(request.num_requests, request.rate, prompt, output, request.seed)
    trace = _read(request.trace, request.skips_bad_rows)[: request.num_requests]
    if request.rate is not None:
        return at_rate(trace, request.rate, request.seed)
    if len(trace) > 1 and trace[-1].arrival_s == 0:
        raise ValueError(f"expected arrival times in {request.trace}; pass --rate")
    return trace


def _read(path: Path, skips_bad_rows: bool) -> list[TraceRequest]:
    if not skips_bad_rows:
        return read_trace(path)
    skipped = SkippedRows()
    trace = read_trace(path, skipped)
    if skipped.num:
        num_rows = len(trace) + skipped.num
        print(f"{path}: skipped {skipped.num} of {num_rows} rows, the first: {skipped.first}", file=sys.stderr)
    return trace
