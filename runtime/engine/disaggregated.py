"""Engine of prefill and decode workers in processes, each of which steps at its own pace and copies KV to others."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import replace

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.group_pipeline import DisaggregatedPipeline, Events
from sageLLM.runtime.engine.pd_timeline import Timeline
from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.kv.copies import KVStats
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.disaggregated import DisaggregatedScheduler
from sageLLM.runtime.scheduler.group_transfers import LoadFailurePolicy
from sageLLM.runtime.scheduler.member import WorkerStatus
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.worker.executor import StepResults
from sageLLM.runtime.worker.io_report import IoReport
from sageLLM.runtime.worker.kv_group import KVGroup
from sageLLM.runtime.worker.orders import GroupOrder
from sageLLM.runtime.worker.prefill_decode import close_memory
from sageLLM.runtime.worker.process_executor import ProcessExecutor

LEASE_SECONDS = 10.0
"""The default lease of a copy between two processes."""


class ExecutorGroup:
    """The executors of the workers of a group, for what concerns all of them."""

    def __init__(self, executors: Sequence[ProcessExecutor], group: KVGroup) -> None:
        self.executors = list(executors)
        self._close_memory = weakref.finalize(self, close_memory, group)

    @property
    def process_ids(self) -> list[int]:
        """The operating system's ids of all worker processes."""
        return [process_id for executor in self.executors for process_id in executor.process_ids]

    def wait(self) -> None:
        for executor in self.executors:
            executor.wait()

    def close(self) -> None:
        for executor in self.executors:
            executor.close()
        self._close_memory()

    def submit(self, order: GroupOrder) -> StepResults:
        raise AssertionError("each worker of the group has its own orders")

    def io_reports(self, hardware: Hardware) -> list[IoReport]:
        return [report for executor in self.executors for report in executor.io_reports(hardware)]

    def reset(self) -> None:
        self.wait()

    def restart(self) -> None:
        raise AssertionError("each worker of the group is started again by itself")


class DisaggregatedEngine(Engine):
    """Serves requests on prefill and decode workers; `workers` reports them, and `set_role` changes the role of one."""

    executor: ExecutorGroup

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        compiler: ModelCompiler,
        config: PDSchedulerConfig,
        budgets: Sequence[KVBudget],
        executors: Sequence[ProcessExecutor],
        roles: Sequence[Role],
        group: KVGroup,
        events: Events,
        *,
        policy: LoadFailurePolicy = "recompute",
        eos_token_ids: frozenset[int] = frozenset(),
        async_scheduling: bool = True,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`budgets`, `executors` and `roles` are those of each worker of the `group`."""
        transfer = config.transfer
        if transfer.lease_s is None:
            transfer = replace(transfer, lease_s=LEASE_SECONDS)
        self._transfer, self._policy = transfer, policy
        self._budgets, self._roles, self._kv_group, self._events = budgets, list(roles), group, events
        self._epochs = [0] * len(roles)
        super().__init__(
            model,
            tokenizer,
            compiler,
            config,
            budgets[0],
            ExecutorGroup(executors, group),
            eos_token_ids=eos_token_ids,
            async_scheduling=async_scheduling,
            grammars=grammars,
        )

    def _start(self) -> None:
        schedulers = [self._role_scheduler(*pair) for pair in zip(self._budgets, self._roles, strict=True)]
        self._whole = schedulers[0]
        num_ranks = [member.tp for member in self._kv_group.members]
        self.group = DisaggregatedScheduler(
            schedulers, self._transfer, time.monotonic, num_ranks=num_ranks, policy=self._policy
        )
        for member, epoch in zip(self.group.members, self._epochs, strict=True):
            member.epoch = epoch
        self._scheduler = self.group
        self._pipeline = self._steps = DisaggregatedPipeline(
            self.group,
            self.executor.executors,
            self._kv_group,
            self._sequences,
            self.tokenizer,
            self._events,
            plans_ahead=self._plans_ahead,
            lease_seconds=self._transfer.lease_s or LEASE_SECONDS,
        )

    def _role_scheduler(self, budget: KVBudget, role: Role) -> PDScheduler:
        return PDScheduler(
            self._config,
            kv_budget=budget,
            max_model_len=self.model.max_model_len,
            switch_len=self.model.tables.switch_len,
            clock=time.monotonic,
            role=role,
        )

    def record_timeline(self) -> Timeline:
        """Records steps and transfers from now on."""
        self._steps.timeline = Timeline()
        return self._steps.timeline

    def workers(self) -> list[WorkerStatus]:
        """Number, role, state and load of each worker."""
        if not self.has_work:
            self._pipeline.settle()
        return self.group.workers()

    def set_role(self, number: int, role: Role) -> None:
        """Lets a worker take another role while requests are served: it drains and switches.

        ValueError for an unknown worker, and for the last one of its role.
        """
        self.group.set_role(number, role)

    def kv_stats(self) -> dict[str, KVStats]:
        if not self.has_work:
            self._pipeline.settle()
        members = self.group.members
        return {f"{member.role} {member.number}": member.scheduler.kv.decode.stats() for member in members}

    def reset_prefix_cache(self) -> None:
        self._pipeline.settle()
        for member in self.group.members:
            member.scheduler.kv.decode.reset_prefix_cache()

    def reset(self, error: BaseException) -> EngineError:
        """Starts all workers again: copies may be in flight."""
        self._steps.close()
        self._roles = [member.role for member in self.group.members]
        self._epochs = [member.epoch + 1 for member in self.group.members]
        for executor, epoch in zip(self.executor.executors, self._epochs, strict=True):
            executor.restart_in_epoch(epoch)
        while not self._events.empty():
            self._events.get()
        return super().reset(error)

    def close(self) -> None:
        self._steps.close()
        super().close()
