"""The engine: queues requests, completes steps of continuous batching, and returns outputs.

In mode `strict` there are two workers, each with its own KV pool; the blocks of a prefilled request are copied from the
prefill worker's pool to the decode worker's.
"""

import time
from typing import Protocol

from sageLLM.runtime.engine.answer_rows import Progress
from sageLLM.runtime.engine.auto_mode import make_chooser
from sageLLM.runtime.engine.kv_events import KVEventPublisher
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.pipeline import StepPipeline
from sageLLM.runtime.engine.requests import check_kv_room, stop_rules, validate_params, validate_prompt
from sageLLM.runtime.engine.sequences import RequestGroup, RequestTraits, Sequence, make_group
from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.grammar.compiler import GrammarCompiler, TokenizerText
from sageLLM.runtime.kv.copies import KVStats
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.base import KVBudget, Request
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.limits import SequenceLimits
from sageLLM.runtime.scheduler.member import WorkerStatus
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.worker.executor import Executor, StepResults
from sageLLM.runtime.worker.faults import LOG, log_end, reason_of, reraise_unless_attributable


class RequestScheduler(Protocol):
    """Queue of requests, as the engine sees a scheduler."""

    @property
    def max_seq_len(self) -> int | None: ...
    @property
    def limits(self) -> SequenceLimits: ...
    def add_request(self, request: Request) -> None: ...
    def abort_request(self, request_id: str) -> bool: ...
    def get_stats(self) -> dict[str, int]: ...


class Steps(Protocol):
    """Steps of the workers, as the engine sees them."""

    def advance(self) -> Progress: ...
    def plan(self) -> StepResults | None: ...
    def settle(self) -> None: ...
    def forget(self, request_id: str) -> None: ...


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
        executor: Executor,
        *,
        objective: ServiceObjective | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        async_scheduling: bool = True,
        num_stages: int = 1,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`eos_token_ids` end an answer in addition to the tokenizer's. `async_scheduling` plans a step ahead.

        `num_stages` is the number of pipeline stages of the executor's workers. `grammars` check those of requests
        before they are queued.
        """
        self.model = model
        self.tokenizer = tokenizer
        eos_ids = eos_token_ids | (tokenizer.eos_token_ids if tokenizer else frozenset[int]())
        # A file may name ids that the model cannot produce; the sampler could not ban them.
        self._eos_ids = frozenset(token_id for token_id in eos_ids if token_id < model.config.V)
        self.is_strict = config.mode == "strict"
        self._compiler, self._config, self._budget, self._objective = compiler, config, budget, objective
        self.executor, self._grammars = executor, grammars
        self._plans_ahead, self._num_stages = async_scheduling, num_stages
        self.num_steps = 0
        self._groups: dict[str, RequestGroup] = {}
        self._sequences: dict[str, Sequence] = {}
        self._kv_events: KVEventPublisher | None = None
        self._start()

    def _start(self) -> None:
        """Starts with an empty scheduler, and no step in flight."""
        self._whole = self._make_scheduler()
        self._scheduler: RequestScheduler = self._whole
        self._pipeline: Steps = self._make_pipeline(self._whole)
        if self._kv_events is not None:
            self._whole.kv.prefill.record_prefixes(self._kv_events.log)

    def publish_kv_events(self, publisher: KVEventPublisher) -> None:
        """Publishes the changes of the prefix cache after each step, from an empty one on."""
        self._kv_events = publisher
        self._whole.kv.prefill.record_prefixes(publisher.log)

    def _make_scheduler(self) -> PDScheduler:
        config, model = self._config, self.model
        chooser = make_chooser(self._compiler, model.device, self._objective) if config.mode == "auto" else None
        return PDScheduler(
            config,
            kv_budget=self._budget,
            max_model_len=model.max_model_len,
            switch_len=model.tables.switch_len,
            clock=time.monotonic,
            mode_chooser=chooser,
            num_stages=self._num_stages,
        )

    def _make_pipeline(self, scheduler: PDScheduler) -> StepPipeline:
        return StepPipeline(
            scheduler,
            self.executor,
            self._sequences,
            self.tokenizer,
            plans_ahead=self._plans_ahead,
            num_stages=self._num_stages,
        )

    @property
    def scheduler(self) -> PDScheduler:
        """The scheduler. Without requests, the step in flight that nobody waits for is completed first."""
        if not self._groups:
            self._pipeline.settle()
            self._publish()
        return self._whole

    @property
    def has_work(self) -> bool:
        return bool(self._groups)

    def kv_stats(self) -> dict[str, KVStats]:
        """Sizes and counters of each worker's KV pool: prefix cache hits, swaps, forks."""
        kv = self.scheduler.kv
        if self.is_strict:
            return {"prefill": kv.prefill.stats(), "decode": kv.decode.stats()}
        return {"worker": kv.decode.stats()}

    def scheduler_stats(self) -> dict[str, int]:
        """Counters and queue sizes of the scheduler."""
        if not self._groups:
            self._pipeline.settle()
        return self._scheduler.get_stats()

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache, for example to measure without hits."""
        self.scheduler.kv.prefill.reset_prefix_cache()
        self._publish()

    def add(self, group_id: str, prompt: str | None, token_ids: list[int], params: SamplingParams) -> None:
        """Checks and queues a request. Raises RequestError, and changes nothing, for one that cannot be served."""
        self.submit(self.prepare(group_id, prompt, token_ids, params))

    def prepare(
        self,
        group_id: str,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        traits: RequestTraits | None = None,
    ) -> RequestGroup:
        """Checks a request and makes its sequences, without queueing it. Raises RequestError if it cannot be served."""
        validate_prompt(token_ids, self.model.config.V, self.model.max_model_len)
        validate_params(params, self.model.config.V)
        check_kv_room(params, len(token_ids), self._scheduler.limits.max_kv_tokens, self.model.max_model_len)
        if params.structured_outputs is not None and self._grammars is not None:
            self._grammars.check(params.structured_outputs, self._eos_ids)
        rules = stop_rules(params, self._eos_ids, len(token_ids), self.max_seq_len)
        salt = self.model.tables.salt(len(token_ids))
        return make_group(group_id, prompt, token_ids, params, rules, self.tokenizer, salt, traits)

    def add_eos_ids(self, token_ids: frozenset[int]) -> None:
        """Further ids that end an answer, for an engine without the tokenizer that knows them."""
        self._eos_ids |= frozenset(token_id for token_id in token_ids if token_id < self.model.config.V)

    def prepare_grammars(self, tokenizer: TokenizerText) -> None:
        """Prepares the vocabulary of grammars, for which a step would wait otherwise."""
        if self._grammars is not None:
            self._grammars.prepare(self._eos_ids, tokenizer)

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    @property
    def max_kv_tokens(self) -> int | None:
        """The tokens that the KV cache holds; None for no limit."""
        return self._scheduler.limits.max_kv_tokens

    @property
    def max_seq_len(self) -> int:
        """The longest prompt with its answer, in tokens: that of the model, or of the KV cache if it holds less."""
        return self._scheduler.max_seq_len or self.model.max_model_len

    @property
    def request_ids(self) -> list[str]:
        """The requests that have not ended, in order of arrival."""
        return list(self._groups)

    def submit(self, group: RequestGroup) -> None:
        """Queues a prepared request. Changes nothing if it raises."""
        if not self._groups:
            self._pipeline.settle()  # so that the prefix cache has the answers that ended with the steps in flight
        try:
            for sequence in group.sequences:
                self._scheduler.add_request(sequence.request)
                self._sequences[sequence.request.request_id] = sequence
        except BaseException:
            for sequence in group.sequences:
                if self._sequences.get(sequence.request.request_id) is sequence:
                    del self._sequences[sequence.request.request_id]
                    self._scheduler.abort_request(sequence.request.request_id)
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
            self._scheduler.abort_request(sequence.request.request_id)
            self._forget(sequence)
        return self._ended(group, reason)

    def abort_answer(self, group_id: str, index: int, reason: str) -> None:
        """Ends one of the answers to a request; unknown and finished ones are ignored."""
        group = self._groups.get(group_id)
        if group is None or group.sequences[index].is_finished:
            return
        sequence = group.sequences[index]
        self._scheduler.abort_request(sequence.request.request_id)
        self._forget(sequence)
        sequence.abort(reason)
        if group.is_finished:
            self._remove(group)

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
        self.executor.reset()
        self._start()
        failure = EngineError(
            f"a step of the engine failed, and its requests have ended: {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        return failure

    def _advance(self) -> Progress:
        progress = self._pipeline.advance()
        self.num_steps += 1
        self._publish()
        return progress

    def _publish(self) -> None:
        """Sends the changes of the prefix cache, if somebody has asked for them."""
        if self._kv_events is not None:
            self._kv_events.publish()

    def step(self, *, only_finished: bool = False) -> list[RequestOutput]:
        """Completes one step; returns the requests with new tokens or an end, in order of arrival.

        `only_finished` leaves out requests that continue, which saves building their outputs.
        """
        progress = self._advance()
        return self._collect(progress.ended if only_finished else progress.changed, only_finished)

    def step_answers(self) -> list[Sequence]:
        """Completes one step; returns the answers with new tokens or an end, without their text.

        The caller keeps count of the tokens that it has taken.
        """
        progress = self._advance()
        for group in {id(answer.group): answer.group for answer in progress.ended}.values():
            if group.is_finished and group.request_id in self._groups:
                self._remove(group)
        return progress.changed

    def is_live(self, group_id: str) -> bool:
        """Whether a request has not ended."""
        return group_id in self._groups

    @property
    def num_sequences(self) -> int:
        """Sequences that have not ended."""
        return len(self._sequences)

    def workers(self) -> list[WorkerStatus]:
        """Role, state and load of each prefill and decode worker; empty if the engine has none in processes."""
        return []

    def set_role(self, number: int, role: Role) -> None:
        """Lets a worker take another role while requests are served. ValueError if it cannot."""
        raise ValueError("no worker has a role: the engine was not started with --prefill-workers and --decode-workers")

    def plan_steps(self) -> StepResults | None:
        """Plans as many steps as can be in flight; returns the results of the one that `step` will complete."""
        return self._pipeline.plan()

    def close(self) -> None:
        """Ends the workers, and the publisher of events."""
        self.executor.close()
        if self._kv_events is not None:
            self._kv_events.close()

    def wait(self) -> None:
        """Returns when no step is running, so that the caller can run other work on the model's device."""
        self.executor.wait()

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
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        request_id = sequence.request.request_id
        self._sequences.pop(request_id, None)
        self._pipeline.forget(request_id)
