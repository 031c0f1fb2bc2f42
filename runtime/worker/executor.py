"""Executors run the orders of the engine on its workers, in the order in which they are submitted."""

from pathlib import Path
from typing import Protocol

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.kv.copies import Tier
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.worker.af_workers import AttentionLinks
from sageLLM.runtime.worker.attention_runner import AttentionRunner
from sageLLM.runtime.worker.block_copies import PoolCopies, TieredPool
from sageLLM.runtime.worker.io_report import IoReport
from sageLLM.runtime.worker.kv_pool import LowerTier, make_pool
from sageLLM.runtime.worker.lookahead import Lookahead
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.order_thread import OrderThread, Pending
from sageLLM.runtime.worker.orders import GroupOrder, StepResult
from sageLLM.runtime.worker.token_return import TokenReturn
from sageLLM.runtime.worker.warm_up import STAGES, StepLimits, warm_up
from sageLLM.runtime.worker.worker import Worker

DEFAULT_LIMITS = StepLimits()


class WorkersLostError(Exception):
    """A worker has died, hangs, or has failed in the middle of a step: its KV is lost, and `restart` is needed."""


class StepResults(Protocol):
    """The results of an order that may still run; a Future is one."""

    def result(self) -> list[StepResult]:
        """Waits for the end of the order."""


class Executor(Protocol):
    """The seam between the engine and its workers.

    Several orders may be submitted before the result of the first is read. `result` of an order raises
    WorkersLostError if workers are lost, and any other error if a step has failed as a whole; call `reset` then.
    """

    def submit(self, order: GroupOrder) -> "StepResults":
        """Runs the order after all earlier ones. The results are those of the decode and of the prefill order."""

    def wait(self) -> None:
        """Returns when no order is running; errors stay in their results."""

    def reset(self) -> None:
        """Waits, and drops all sequences from the workers."""

    def restart(self) -> None:
        """Starts new workers, with empty KV pools, in place of lost ones. Raises EngineError if they do not start."""

    def io_reports(self, hardware: Hardware) -> list[IoReport]:
        """The transfers between tiers of each graph that has run, planned with the rates of the hardware."""

    def close(self) -> None:
        """Ends the workers."""


class InProcessExecutor:
    """Workers in this process: one, or in strict mode one for prefill and one for decode, with a KV pool each.

    With `is_async`, orders run in a thread of their own, and the engine plans the next step meanwhile: native kernels
    run without Python's lock. Otherwise `submit` runs the order.
    """

    def __init__(
        self,
        model: Model,
        compiler: ModelCompiler,
        budget: KVBudget,
        *,
        is_split: bool,
        is_async: bool,
        disk_folder: Path | None = None,
        isolates_failures: bool = True,
        num_ubatches: int = 1,
        token_return: TokenReturn | None = None,
        lower_tier: LowerTier | None = None,
        links: AttentionLinks | None = None,
        grammars: GrammarCompiler | None = None,
        pool_memory: int | None = None,
        limits: StepLimits = DEFAULT_LIMITS,
    ) -> None:
        """`isolates_failures` lets an error end the sequence that it belongs to, instead of the step.

        `token_return` is for a pipeline stage of the model. `lower_tier` has the blocks of running requests for which
        the decoder's pool has no room. With `links` the feed-forwards run on FFN workers. `grammars` are for requests
        with structured output. `pool_memory` is a descriptor of memory for the decoder's pool that other workers map.
        On a GPU steps within the `limits` run once with padding, so that no kernel is compiled later.
        """
        on_gpu = compiler.planner.device is not None

        def make_runner(num_blocks: int, lower_tier: LowerTier | None = None, memory: int | None = None) -> ModelRunner:
            num_blocks += on_gpu  # the last one for padding
            pool = make_pool(model, num_blocks, budget.block_size, lower_tier, memory)
            if links is None:
                return ModelRunner(model, pool, compiler, num_ubatches=num_ubatches, max_rows=limits.max_rows)
            return AttentionRunner(model, pool, compiler, num_ubatches=num_ubatches, links=links)

        decoder = make_runner(budget.num_blocks, lower_tier, pool_memory)
        tier_sizes: dict[Tier, int] = {"host": budget.num_host_blocks, "disk": budget.num_disk_blocks}
        tiers = TieredPool(decoder.pool, tier_sizes, compiler, disk_folder)
        self.decoder = self.prefiller = Worker(
            decoder, tiers, isolates_failures=isolates_failures, token_return=token_return, grammars=grammars
        )
        self._migrator: PoolCopies | None = None
        if is_split:
            prefiller = make_runner(budget.num_prefill_blocks or budget.num_blocks)
            self.prefiller = Worker(
                prefiller, isolates_failures=isolates_failures, token_return=token_return, grammars=grammars
            )
            graph = compiler.migrate_graph()
            self._migrator = PoolCopies(prefiller.pool, decoder.pool, graph, compiler.kernels)
        if on_gpu and links is None:
            warm_up(decoder, limits, ("decode",) if is_split else STAGES)
            if is_split:
                warm_up(self.prefiller.runner, limits, ("prefill",))
        # Ranks exchange tokens in each step, so that none of their steps can start before it ends.
        launches = on_gpu and is_async and isolates_failures and links is None
        self.lookahead = Lookahead(self.decoder, self.execute) if launches else None
        has_thread = is_async and not launches
        self._thread = OrderThread[GroupOrder, list[StepResult]]("sagellm-worker") if has_thread else None
        self._last: Pending[list[StepResult]] | None = None

    def submit(self, order: GroupOrder) -> Pending[list[StepResult]]:
        if self.lookahead is not None:
            self._last = self.lookahead.submit(order)
            return self._last
        if self._thread is not None:
            self._last = self._thread.submit(self.execute, order)
            return self._last
        pending: Pending[list[StepResult]] = Pending()
        pending.run(self.execute, order)
        return pending

    def io_reports(self, hardware: Hardware) -> list[IoReport]:
        """The transfers between tiers of each graph that has run."""
        self.wait()
        return [report for worker in self._workers() for report in worker.runner.io_reports(hardware)]

    def wait(self) -> None:
        if self._last is not None:
            self._last.wait()

    def reset(self) -> None:
        self.wait()
        for worker in self._workers():
            worker.reset()

    def _workers(self) -> list[Worker]:
        return [self.decoder] if self.prefiller is self.decoder else [self.decoder, self.prefiller]

    def restart(self) -> None:
        raise AssertionError("workers in this process cannot be lost")

    def close(self) -> None:
        self.wait()
        for thread in (self.lookahead, self._thread):
            if thread is not None:
                thread.close()
        for worker in self._workers():
            worker.close()

    def execute(self, order: GroupOrder) -> list[StepResult]:
        """Runs an order in the calling thread."""
        if order.prefill is None and order.decode is not None and not order.migrations:  # the steady case
            self.decoder.begin(order.decode)
            return [self.decoder.run(order.decode)]
        parts = [(self.decoder, order.decode), (self.prefiller, order.prefill)]
        busy = [(worker, part) for worker, part in parts if part is not None]
        for worker, part in busy:
            worker.begin(part)
        if order.migrations and self._migrator is not None:
            self._migrator.run(order.migrations)
        return [worker.run(part) for worker, part in busy]
