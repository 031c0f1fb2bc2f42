"""State of the PD scheduler, shared by the objects that change it."""

from collections.abc import Callable
from dataclasses import dataclass

from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.scheduler.decode_queue import DecodeQueue
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.migration import Migration
from sageLLM.runtime.scheduler.placement import KVPlacement
from sageLLM.runtime.scheduler.policy import Policy
from sageLLM.runtime.scheduler.stats import SchedulerCounters
from sageLLM.runtime.scheduler.steps import StepQueue
from sageLLM.runtime.scheduler.swaps import Swaps
from sageLLM.runtime.scheduler.table import RequestTable


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """The parts of the scheduler that hold state.

    `Lifecycle`, `Admission`, `Preemption`, `StepCommit` and `Recovery` hold none: they are the operations that span
    several parts.
    """

    config: PDSchedulerConfig
    policy: Policy
    clock: Callable[[], float]
    max_batch_size: int
    limits: SequenceLimits
    kv: KVPlacement
    table: RequestTable
    steps: StepQueue
    decodes: DecodeQueue
    migration: Migration
    swaps: Swaps
    counters: SchedulerCounters
