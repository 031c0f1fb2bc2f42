"""The engine: continuous batching as a loop of schedule, run, sample, update.

In mode `strict` there are two workers, each with its own KV pool; the blocks of a prefilled request are copied from the
prefill worker's pool to the decode worker's.
"""

import time
from pathlib import Path

from sageLLM.runtime.engine.auto_mode import make_chooser
from sageLLM.runtime.engine.batch_runner import BatchRunner
from sageLLM.runtime.engine.block_copies import Migrator, TieredPool
from sageLLM.runtime.engine.faults import LOG, log_end, reason_of, reraise_unless_attributable
from sageLLM.runtime.engine.kv_pool import make_pool
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.requests import check_kv_room, stop_rules, validate_params, validate_prompt
from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.engine.sequences import RequestGroup, Sequence, make_group
from sageLLM.runtime.engine.worker import Worker
from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.kv.copies import KVStats, Tier
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.base import KVBudget, ScheduleOutput
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.text.tokenizer import Tokenizer


class Engine:
    """Serves requests on one model. `step()` advances all of them and returns those that changed.

    `prepare` checks a request without side effects, `submit` queues it, `add` does both.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        compiler: ModelCompiler,
        config: PDSchedulerConfig,
        budget: KVBudget,
        *,
        disk_folder: Path | None = None,
        objective: ServiceObjective | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`eos_token_ids` end an answer in addition to the tokenizer's."""
        self.model = model
        self.tokenizer = tokenizer
        eos_ids = eos_token_ids | (tokenizer.eos_token_ids if tokenizer else frozenset[int]())
        # A file may name ids that the model cannot produce; the sampler could not ban them.
        self._eos_ids = frozenset(token_id for token_id in eos_ids if token_id < model.config.V)
        self.is_strict = config.mode == "strict"

        def make_scheduler() -> PDScheduler:
            return PDScheduler(
                config,
                kv_budget=budget,
                max_model_len=model.max_model_len,
                switch_len=model.tables.switch_len,
                clock=time.monotonic,
                mode_chooser=make_chooser(compiler, model.device.type, objective) if config.mode == "auto" else None,
            )

        self._make_scheduler = make_scheduler
        self.scheduler = make_scheduler()
        self.decoder = Worker(model, make_pool(model, budget.num_blocks, budget.block_size), compiler)
        self.prefiller = self.decoder
        if self.is_strict:
            blocks = budget.num_prefill_blocks or budget.num_blocks
            self.prefiller = Worker(model, make_pool(model, blocks, budget.block_size), compiler)
            graph = compiler.migrate_graph()
            self._migrator = Migrator(self.prefiller.pool, self.decoder.pool, graph, compiler.kernels)
        tier_sizes: dict[Tier, int] = {"host": budget.num_host_blocks, "disk": budget.num_disk_blocks}
        self._tiers = TieredPool(self.decoder.pool, tier_sizes, compiler, disk_folder)
        self.num_steps = 0
        self._groups: dict[str, RequestGroup] = {}
        self._sequences: dict[str, Sequence] = {}
        self._runner = self._make_runner()

    def _make_runner(self) -> BatchRunner:
        return BatchRunner(self.decoder, self.prefiller, self.scheduler, self._sequences, self.tokenizer)

    @property
    def has_work(self) -> bool:
        return bool(self._groups)

    def kv_stats(self) -> dict[str, KVStats]:
        """Sizes and counters of each worker's KV pool: prefix cache hits, swaps, forks."""
        kv = self.scheduler.kv
        if self.is_strict:
            return {"prefill": kv.prefill.stats(), "decode": kv.decode.stats()}
        return {"worker": kv.decode.stats()}

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache, for example to measure without hits."""
        self.scheduler.kv.prefill.reset_prefix_cache()

    def add(self, group_id: str, prompt: str | None, token_ids: list[int], params: SamplingParams) -> None:
        """Checks and queues a request. Raises RequestError, and changes nothing, for one that cannot be served."""
        self.submit(self.prepare(group_id, prompt, token_ids, params))

    def prepare(self, group_id: str, prompt: str | None, token_ids: list[int], params: SamplingParams) -> RequestGroup:
        """Checks a request and makes its sequences, without queueing it. Raises RequestError if it cannot be served."""
        validate_prompt(token_ids, self.model.config.V, self.model.max_model_len)
        validate_params(params, self.model.config.V)
        check_kv_room(params, len(token_ids), self.scheduler.limits.max_kv_tokens, self.model.max_model_len)
        rules = stop_rules(params, self._eos_ids, len(token_ids), self._max_seq_len)
        salt = self.model.tables.salt(len(token_ids))
        return make_group(group_id, prompt, token_ids, params, rules, self.tokenizer, salt)

    @property
    def _max_seq_len(self) -> int:
        """The longest prompt with its answer, in tokens: that of the model, or of the KV cache if it holds less."""
        return self.scheduler.max_seq_len or self.model.max_model_len

    def submit(self, group: RequestGroup) -> None:
        """Queues a prepared request. Changes nothing if it raises."""
        try:
            for sequence in group.sequences:
                self.scheduler.add_request(sequence.request)
                self._sequences[sequence.request.request_id] = sequence
        except BaseException:
            for sequence in group.sequences:
                if self._sequences.pop(sequence.request.request_id, None) is sequence:
                    self.scheduler.abort_request(sequence.request.request_id)
            raise
        self._groups[group.request_id] = group

    def refuse(self, group: RequestGroup, error: BaseException) -> RequestOutput:
        """The output of a request that `submit` has not accepted."""
        return self._ended(group, reason_of(error))

    def abort(self, group_id: str, reason: str = "aborted by the caller") -> RequestOutput | None:
        """Ends a request in any state and returns its output so far; None if the id is unknown.

        The reason becomes the `stop_reason` of its unfinished answers.
        """
        group = self._groups.pop(group_id, None)
        if group is None:
            return None
        for sequence in group.sequences:
            self.scheduler.abort_request(sequence.request.request_id)
            self._sequences.pop(sequence.request.request_id, None)
        return self._ended(group, reason)

    def _ended(self, group: RequestGroup, reason: str) -> RequestOutput:
        group.metrics.record_finish(time.monotonic())
        for sequence in group.sequences:
            sequence.abort(reason)
        return group.output()

    def reset(self, error: BaseException) -> EngineError:
        """Drops all requests and starts with an empty scheduler, after a step that has raised; returns what to report.

        Needed only for errors outside of any request, such as a full disk of a swap tier: the step may be half done.
        """
        LOG.error("a step failed; its %d requests have ended", len(self._groups), exc_info=error)
        self._groups.clear()
        self._sequences.clear()
        try:
            self._tiers.wait()  # a copy in the background must not write to blocks that new requests get
        except Exception:
            LOG.error("a copy to a swap tier failed", exc_info=True)
        self.scheduler = self._make_scheduler()
        self._runner = self._make_runner()
        failure = EngineError(
            f"a step of the engine failed, and its requests have ended: {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        return failure

    def step(self, *, only_finished: bool = False) -> list[RequestOutput]:
        """Plans and runs one step; returns the requests with new tokens or an end, in order of arrival.

        `only_finished` leaves out requests that continue, which saves building their outputs.
        """
        plan = self.scheduler.schedule()
        self._copy_blocks(plan)
        self._record_hits(plan)
        changed = self._runner.run(plan)
        # The copies out to a tier ran concurrently with the batches. They must be complete before the commit, which
        # frees their source blocks.
        self._tiers.wait()
        self.num_steps += 1
        changed += self._update([s.request.request_id for s in changed if s.is_finished])
        return self._collect([s for s in changed if s.is_finished] if only_finished else changed, only_finished)

    def _copy_blocks(self, plan: ScheduleOutput) -> None:
        """Copies KV blocks before the batches run.

        The source of a fork is the partial last block of its parent, which the parent's decode in this step writes to.
        Copies into the device pool are complete on return, as this step decodes them; copies out to a tier continue in
        the background.
        """
        if plan.block_copies:
            self._tiers.copy_blocks(plan.block_copies)
        if plan.tier_copies:
            self._tiers.start(plan.tier_copies)
        if plan.kv_migrations:
            self._migrator.run(plan.kv_migrations)

    def _record_hits(self, plan: ScheduleOutput) -> None:
        """Records the prompt's hits in the prefix cache; hits of a replay on its own KV do not count."""
        for request_id, num_tokens in plan.num_cached_tokens.items():
            sequence = self._sequences[request_id]
            if sequence.index == 0 and not sequence.request.num_preemptions:
                sequence.group.num_cached_tokens = num_tokens

    def _update(self, finished_ids: list[str]) -> list[Sequence]:
        """Commits the step; returns the sequences that the scheduler had to end because the KV pool is full."""
        ended = []
        for request_id in self.scheduler.update_after_step(finished_ids):
            sequence = self._sequences[request_id]
            room = self.scheduler.limits.max_kv_tokens
            sequence.end_early(f"the KV cache of {room} tokens is full; raise num_kv_blocks")
            ended.append(sequence)
        return ended

    def _collect(self, changed: list[Sequence], only_finished: bool) -> list[RequestOutput]:
        groups = {sequence.group.request_id: sequence.group for sequence in changed}
        outputs = []
        for group in groups.values():
            if group.is_finished:
                self._remove(group)
            if group.is_finished or (group.is_streamed and not only_finished):
                outputs.append(self._output(group))
        return outputs

    def _output(self, group: RequestGroup) -> RequestOutput:
        try:
            return group.output()
        except BaseException as error:  # text is decoded when it is read
            reraise_unless_attributable(error)
            if group.request_id in self._groups:
                log_end(group.request_id, reason_of(error), error)
                self.abort(group.request_id, reason_of(error))
            return group.output()

    def _remove(self, group: RequestGroup) -> None:
        group.metrics.record_finish(time.monotonic())
        del self._groups[group.request_id]
        for sequence in group.sequences:
            del self._sequences[sequence.request.request_id]
