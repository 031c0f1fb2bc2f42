"""Recording of the steps of plans: their sizes, inputs, and the times of their calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.executor.native.call_times import CallTime


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step of a graph: the sizes that its tensors determine, its inputs, and the times of its calls."""

    graph: ExecutionGraph
    sizes: Mapping[str, int]
    inputs: Mapping[str, Tensor | None]
    times: list[CallTime]


@dataclass(slots=True)
class StepRecorder:
    """Gets the steps of the plans that share it while `sink` is set; without it steps are not timed."""

    sink: Callable[[RecordedStep], None] | None = None
