"""Profile of an engine's steps: time, bytes and operations of each op, and the fraction of the machine's limit.

The limit of a kernel is the longer of its operations at the peak rate and its bytes at the rate of memory (the roofline
model of Williams, Waterman and Patterson, CACM 52(4), 2009). Operands that stay in a cache can exceed it. The limit of
a transfer between tiers is the rate of the link.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from sageLLM.runtime.core.cost import Hardware, dtype_of
from sageLLM.runtime.core.ir.dims import Dim, evaluate
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.passes.part_sizes import DIVIDED
from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.io_overlap import is_io
from sageLLM.runtime.executor.native.call_times import CallTime
from sageLLM.runtime.executor.native.recorder import RecordedStep
from sageLLM.runtime.executor.planner import NativePlanner

HEAD = ("op", "calls", "ms", "share", "GFLOP", "GB", "GFLOP/s", "GB/s", "of limit", "bound by")
SECONDS_TO_MS, GIGA = 1e3, 1e9


@dataclass(slots=True)
class OpTotal:
    """The calls of an op in all steps of a stage; `limit_s` is their least time on the hardware."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    compute_s: float = 0.0
    memory_s: float = 0.0

    @property
    def limit_s(self) -> float:
        return max(self.compute_s, self.memory_s)

    def row(self, op: str, total_s: float) -> tuple[str, ...]:
        seconds = self.seconds or float("inf")
        bound = "" if not self.limit_s else "compute" if self.compute_s > self.memory_s else "memory"
        return (
            op,
            str(self.calls),
            f"{self.seconds * SECONDS_TO_MS:.2f}",
            f"{self.seconds / total_s:.1%}",
            f"{self.flops / GIGA:.3f}",
            f"{self.bytes / GIGA:.3f}",
            f"{self.flops / seconds / GIGA:.1f}",
            f"{self.bytes / seconds / GIGA:.1f}",
            f"{self.limit_s / seconds:.0%}" if bound else "",
            bound,
        )


@dataclass(slots=True)
class StageTotal:
    """The steps of a stage. `seconds` is from the first call of a step to the end of its last."""

    steps: int = 0
    seconds: float = 0.0
    ops: dict[str, OpTotal] = field(default_factory=dict)
    side_s: dict[int, float] = field(default_factory=dict)
    hidden_s: dict[int, float] = field(default_factory=dict)


class NodeWork(NamedTuple):
    """Operations and bytes of a node as formulas of the step's sizes, and the limits of their rates."""

    flops: Dim
    bytes: Dim
    peak_flops: float
    bandwidth: float


class StepProfile:
    """Adds up the steps that a `StepRecorder` records."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.stages: dict[str, StageTotal] = {}
        self._work: dict[int, tuple[ExecutionGraph, dict[str, NodeWork]]] = {}

    def add(self, step: RecordedStep) -> None:
        if not step.times:
            return
        stage = self.stages.setdefault(step.graph.stage or step.graph.graph_id, StageTotal())
        sizes = {**step.sizes, **step_work(step.graph, step.inputs)}
        work = self._work_of(step.graph)
        for one in step.times:
            total = stage.ops.setdefault(one.op, OpTotal())
            total.calls += 1
            total.seconds += one.seconds
            if one.op in ("copy", "poison"):  # calls that the plan adds for a node
                continue
            own = work[one.node_id]
            flops, num_bytes = _number(own.flops, sizes), _number(own.bytes, sizes)
            total.flops += flops
            total.bytes += num_bytes
            total.compute_s += flops / own.peak_flops
            total.memory_s += num_bytes / own.bandwidth
        stage.steps += 1
        stage.seconds += (max(t.end_ns for t in step.times) - min(t.begin_ns for t in step.times)) / 1e9
        for number in {t.stream for t in step.times} - {0}:
            side, hidden = _hidden_seconds(step.times, number)
            stage.side_s[number] = stage.side_s.get(number, 0.0) + side
            stage.hidden_s[number] = stage.hidden_s.get(number, 0.0) + hidden

    def table(self) -> str:
        """A table per stage, the slowest op first."""
        hardware = self.hardware
        peaks = ", ".join(f"{rate / GIGA:,.0f} GFLOP/s {dtype}" for dtype, rate in hardware.peak_flops.items())
        lines = [f"limits of {hardware.name}: {hardware.memory_bandwidth / GIGA:.1f} GB/s, {peaks}"]
        for name, stage in self.stages.items():
            lines += ["", *_stage_lines(name, stage)]
        return "\n".join(lines)

    def _work_of(self, graph: ExecutionGraph) -> dict[str, NodeWork]:
        if id(graph) not in self._work:
            memo: Memo = {}
            nodes = [node for node in graph.nodes.values() if isinstance(node, OpNode)]
            work = {node.node_id: _work_of_node(node, self.hardware, memo) for node in nodes}
            self._work[id(graph)] = graph, work  # the graph is kept, so that its id is not used again
        return self._work[id(graph)][1]


@contextmanager
def profiled(llm: LLM, hardware: Hardware) -> Iterator[StepProfile]:
    """Profiles the steps that an engine runs in the context. Raises SageError if it does not run native plans here."""
    planner = llm.compiler.planner
    if llm.runs_in_processes:
        raise SageError("a profile requires the model in this process; use one rank and backend 'uni'")
    if not isinstance(planner, NativePlanner):
        raise SageError(f"a profile requires the kernels 'cpu', got {planner.name!r}")
    profile = StepProfile(hardware)
    planner.recorder.sink = profile.add
    try:
        yield profile
    finally:
        planner.recorder.sink = None


def step_work(graph: ExecutionGraph, inputs: Mapping[str, Tensor | None]) -> dict[str, int]:
    """The sizes that depend on the lengths of the sequences of a step, also for each micro-batch."""
    sizes = _work_sizes(inputs, "", graph.model_config)
    part = 0
    while own := _work_sizes(inputs, f".p{part}", graph.model_config):
        sizes |= {f"{name}{part}": size for name, size in own.items() if name in DIVIDED}
        part += 1
    return sizes


def _work_sizes(inputs: Mapping[str, Tensor | None], suffix: str, config: Any) -> dict[str, int]:
    lengths, starts = inputs.get(f"seq_lens{suffix}"), inputs.get(f"q_start{suffix}")
    if lengths is None:
        return {}
    kept = lengths.tolist()
    new = [1] * len(kept) if starts is None else [b - a for a, b in pairwise(starts.tolist())]
    pairs = [(n, k) for n, k in zip(new, kept, strict=True)]
    num_tokens, num_decodes = sum(new), sum(n == 1 for n in new)
    experts, per_token = getattr(config, "X", 0), getattr(config, "A", 0)
    return {
        "Td": num_decodes,
        "Tp": num_tokens - num_decodes,
        "KV": sum(kept),
        "KVd": sum(k for n, k in pairs if n == 1),
        "LL": sum(k * k for k in kept),
        "QK": sum(n * (k - n) + n * (n + 1) // 2 for n, k in pairs),
        "EX": min(experts, per_token * num_tokens),
    }


def _work_of_node(node: OpNode, hardware: Hardware, memo: Memo) -> NodeWork:
    bandwidth = hardware.memory_bandwidth
    if is_io(node):
        disk = hardware.disk_link if node.metadata["tier"] == "disk" else None
        link = disk or hardware.host_link
        bandwidth = 2 * link.bandwidth  # bytes count the read and the write, and cross the link once
    peak = hardware.peak_of(dtype_of(node, hardware))
    return NodeWork(node.flops({}, memo), node.bytes_moved({}, memo), peak, bandwidth)


def _number(amount: Dim, sizes: Mapping[str, int]) -> int:
    value = evaluate(amount, sizes)
    return value if isinstance(value, int) else 0


def _hidden_seconds(times: list[CallTime], stream: int) -> tuple[float, float]:
    """The time of a stream's calls, and how much of it calls of stream 0 run at the same time."""
    main = [(t.begin_ns, t.end_ns) for t in times if t.stream == 0]
    side = [(t.begin_ns, t.end_ns) for t in times if t.stream == stream]
    hidden = sum(max(0, min(b, d) - max(a, c)) for a, b in side for c, d in main)
    return sum(b - a for a, b in side) / 1e9, hidden / 1e9


def _stage_lines(name: str, stage: StageTotal) -> Iterator[str]:
    in_kernels = sum(total.seconds for total in stage.ops.values())
    yield f"{name}: {stage.steps} steps of {stage.seconds / stage.steps * SECONDS_TO_MS:.3f} ms on average"
    ops = sorted(stage.ops.items(), key=lambda item: -item[1].seconds)
    rows = [HEAD, *(total.row(op, in_kernels) for op, total in ops)]
    everything = OpTotal(*(sum(getattr(total, one) for _, total in ops) for one in OpTotal.__slots__))
    rows.append(everything.row("all", in_kernels))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
    for number in sorted(stage.side_s):
        side = stage.side_s[number]
        share = stage.hidden_s[number] / side if side else 0.0
        yield f"stream {number}: {side * SECONDS_TO_MS:.2f} ms, {share:.0%} hidden by computation"
