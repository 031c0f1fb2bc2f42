"""Report of a plan's transfers between tiers: the part that computation hides, measured and planned."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.execution_graph.io_overlap import IoOverlap, planned_overlap
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.executor.planner import Runnable


class IoReport(NamedTuple):
    """The io of all steps of a graph, of its last step, and of that step as planned; None if it cannot be estimated."""

    graph: str
    num_steps: int
    total: IoOverlap
    last: IoOverlap
    planned: IoOverlap | None

    def of_rank(self, rank: int) -> IoReport:
        """The report, named as that of a rank of several worker processes."""
        return self._replace(graph=f"{self.graph} on rank {rank}")

    def __str__(self) -> str:
        per_step = 1e3 * self.total.io_s / max(self.num_steps, 1)
        planned = "" if self.planned is None else f"; planned {self.planned.hidden_fraction:.0%}"
        hidden = f"{self.total.hidden_fraction:.0%} hidden by computation{planned}"
        return f"io of {self.graph}: {self.num_steps} steps, {per_step:.2f} ms of io per step, {hidden}"


def report_io(plan: Runnable, hardware: Hardware) -> IoReport | None:
    """The report of a plan; None for one without transfers, or on the torch references, which run in order."""
    if not isinstance(plan, NativePlan) or plan.io is None or not plan.io.num_steps:
        return None
    try:
        planned = planned_overlap(plan.graph, hardware, _all_sizes(plan))
    except IRError:
        planned = None
    return IoReport(plan.graph.graph_id, plan.io.num_steps, plan.io.total, plan.io.last, planned)


def _all_sizes(plan: NativePlan) -> dict[str, int]:
    """The sizes of the last step, with those that depend on the lengths of its sequences (`specs/dims.yaml`)."""
    sizes, inputs = plan.last_step
    ends, starts = inputs.get("seq_lens"), inputs.get("q_start")
    if ends is None or starts is None:
        return dict(sizes)
    lengths: npt.NDArray[np.int64] = ends.numpy().astype(np.int64)
    new: npt.NDArray[np.int64] = np.diff(starts.numpy()).astype(np.int64)
    is_decode = new == 1
    return {
        **sizes,
        "T": int(new.sum()),
        "Td": int(is_decode.sum()),
        "Tp": int(new[~is_decode].sum()),
        "KV": int(lengths.sum()),
        "KVd": int(lengths[is_decode].sum()),
        "LL": int(np.square(lengths).sum()),
        "QK": int((new * (lengths - new) + new * (new + 1) // 2).sum()),
    }
