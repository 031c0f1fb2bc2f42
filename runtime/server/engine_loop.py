"""Runs an engine for the server's front: commands in, one message per step out."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING

from sageLLM.runtime.engine.sequences import RequestGroup, RequestTraits, Sequence
from sageLLM.runtime.errors import RequestError, SageError
from sageLLM.runtime.grammar.compiler import TokenizerText
from sageLLM.runtime.sampling.logprobs import Logprob
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.request import RequestStatus
from sageLLM.runtime.server.messages import (
    Abort,
    Arrived,
    Command,
    Delta,
    Embed,
    Embedded,
    Event,
    Load,
    Ready,
    Rejected,
    RoleAccepted,
    ScoredToken,
    SetRole,
    SetTokenizer,
    Step,
    StepFailed,
    Submit,
    WorkerLoad,
)
from sageLLM.runtime.worker.faults import LOG, reason_of

if TYPE_CHECKING:
    from sageLLM.runtime.engine.llm import LLM
    from sageLLM.runtime.server.kv_handoff import KVHandoff

LOAD_SECONDS = 0.05
"""The shortest time between two reports of the load."""
ABORTED = "aborted by the caller"


class EngineLoop:
    """Executes the commands of a front on an engine without other callers, until None is in the queue.

    The engine has no tokenizer: stop strings are found by the front, which then aborts the answer. With a `handoff` it
    exchanges the KV of prompts with other engines.
    """

    def __init__(
        self,
        llm: LLM,
        commands: SimpleQueue[Command | None],
        send: Callable[[Event], None],
        handoff: KVHandoff | None = None,
    ) -> None:
        self._llm, self._handoff = llm, handoff
        self._commands = commands
        self._send = send
        self._num_sent: dict[str, int] = {}  # tokens sent, by the id of the sequence
        self._waiting: dict[str, RequestGroup] = {}  # requests that have not been scheduled yet
        self._queue_seconds: dict[str, float] = {}
        self._load_time = 0.0

    def run(self) -> None:
        while self._apply_commands():
            if self._has_work:
                self._step()

    @property
    def _has_work(self) -> bool:
        return self._llm.model.generates and self._llm.engine.has_work

    def _apply_commands(self) -> bool:
        """Executes the queued commands; waits for one if there are no requests. False at the end."""
        while not self._has_work or not self._commands.empty():
            self._advance_handoff()
            command = self._commands.get()
            if command is None:
                return False
            self._apply(command)
        self._advance_handoff()
        return True

    def _advance_handoff(self) -> None:
        if self._handoff is not None:
            self._handoff.advance()

    def _apply(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Arrived():
                self._take_arrived(command)
            case Abort(request_id=request_id) if self._handoff is not None and self._handoff.forget(request_id):
                self._send(Step([Delta(request_id, command.index or 0, [], "abort", ABORTED)]))
            case Abort(request_id=request_id, index=None):
                self._llm.engine.abort(request_id, ABORTED)
                self._waiting.pop(request_id, None)
                self._forget(request_id)
            case Abort(request_id=request_id, index=int(index)):
                self._llm.engine.abort_answer(request_id, index, ABORTED)
            case Embed():
                self._embed(command)
            case SetRole():
                self._set_role(command)
            case SetTokenizer(eos_ids=eos_ids, json=text, num_tokens=num_tokens):
                self._llm.engine.add_eos_ids(frozenset(eos_ids))
                if text is not None:
                    self._llm.engine.prepare_grammars(TokenizerText(text, num_tokens))

    def _submit(self, command: Submit, group: RequestGroup | None = None) -> None:
        """Queues a request; its `group` has been prepared if its KV was fetched since then."""
        engine = self._llm.engine
        traits = RequestTraits(command.priority, command.deadline, command.tenant, command.cache_salt)
        try:
            if group is None:
                group = engine.prepare(command.request_id, None, command.token_ids, command.params, traits)
                if self._handoff is not None and self._handoff.delays(command, group):
                    return
            engine.submit(group)
        except RequestError as error:
            self._send(Rejected(command.request_id, str(error), error.param))
            return
        except Exception as error:  # a request must not end the engine
            LOG.error("request %s was not queued", command.request_id, exc_info=error)
            self._send(Rejected(command.request_id, f"the request failed: {reason_of(error)}"))
            return
        self._waiting[command.request_id] = group
        self._num_sent.update({answer.request.request_id: 0 for answer in group.sequences})

    def _set_role(self, command: SetRole) -> None:
        try:
            self._llm.engine.set_role(command.number, command.role)
        except ValueError as error:
            self._send(Rejected(command.request_id, str(error)))
            return
        self._send(Step([], load_of(self._llm)))
        self._send(RoleAccepted(command.request_id))

    def _take_arrived(self, arrived: Arrived) -> None:
        assert self._handoff is not None
        waiting, failure = self._handoff.take(arrived)
        if waiting is None:
            return
        if failure is None:
            self._submit(*waiting)
        else:
            self._send(Rejected(waiting.command.request_id, f"the KV of the prompt was not fetched: {failure}"))

    def _embed(self, command: Embed) -> None:
        try:
            outputs = self._llm.embed(
                command.prompts,
                pooling=command.pooling,  # type: ignore[arg-type]
                normalize=command.normalize,
            )
        except SageError as error:
            self._send(Rejected(command.request_id, str(error), getattr(error, "param", None)))
            return
        except Exception as error:
            LOG.error("embedding %s failed", command.request_id, exc_info=error)
            self._send(Rejected(command.request_id, f"the request failed: {reason_of(error)}"))
            return
        self._send(Embedded(command.request_id, [one.embedding.float().numpy().tobytes() for one in outputs]))

    def _step(self) -> None:
        engine = self._llm.engine
        try:
            changed = engine.step_answers()
        except Exception as error:
            ended = engine.request_ids
            failure = engine.reset(error)
            if self._handoff is not None:
                ended += self._handoff.reset()
            self._num_sent.clear()
            self._waiting.clear()
            self._queue_seconds.clear()
            self._send(StepFailed(ended, str(failure)))
            return
        if self._waiting:
            self._note_scheduled()
        self._send(Step([self._delta(answer) for answer in changed], self._load()))

    def _note_scheduled(self) -> None:
        """Records the time in the queue of the requests that were scheduled for the first time."""
        now = time.monotonic()
        for name, group in list(self._waiting.items()):
            if group.sequences[0].request.status is not RequestStatus.WAITING:
                self._queue_seconds[name] = now - group.metrics.arrival_time
                del self._waiting[name]

    def _delta(self, answer: Sequence) -> Delta:
        group, sequence_id = answer.group, answer.request.request_id
        num_sent = self._num_sent.get(sequence_id, 0)
        new = list(answer.request.output_token_ids[num_sent:])
        logprobs = answer.logprobs[num_sent:] if group.params.logprobs is not None else None
        reason = answer.text.finish_reason
        is_first = num_sent == 0 and answer.index == 0
        delta = Delta(
            group.request_id,
            answer.index,
            new,
            reason,
            answer.text.stop_reason,
            None if logprobs is None else [_scored(one) for one in logprobs],
            group.num_cached_tokens if is_first else None,
            self._queue_seconds.get(group.request_id) if is_first else None,
            self._prompt_scores(group) if is_first else None,
            None if reason is None else answer.request.num_preemptions,
            None if reason is None or self._handoff is None else self._handoff.ticket_for(answer),
        )
        self._num_sent[sequence_id] = num_sent + len(new)
        if group.is_finished:
            self._forget(group.request_id)
        return delta

    @staticmethod
    def _prompt_scores(group: RequestGroup) -> list[list[ScoredToken]] | None:
        if group.params.prompt_logprobs is None:
            return None
        return [_scored(group.scored[position]) for position in sorted(group.scored)]

    def _forget(self, request_id: str) -> None:
        self._queue_seconds.pop(request_id, None)
        index = 0
        while self._num_sent.pop(f"{request_id}/{index}", None) is not None:
            index += 1

    def _load(self) -> Load | None:
        now = time.monotonic()
        if now < self._load_time + LOAD_SECONDS and self._has_work:
            return None
        self._load_time = now
        return load_of(self._llm)


def _scored(entries: dict[int, Logprob]) -> list[ScoredToken]:
    return [(token_id, one.logprob, one.rank) for token_id, one in entries.items()]


def load_of(llm: LLM) -> Load:
    """The load of the engine now; in strict mode with the KV blocks of both pools."""
    engine = llm.engine
    stats, pools = engine.scheduler_stats(), list(engine.kv_stats().values())
    return Load(
        num_running=stats["num_running"],
        num_waiting=stats["num_waiting"],
        num_preempted=stats["num_preempted"],
        kv_blocks_total=sum(pool.num_blocks or 0 for pool in pools),
        kv_blocks_used=sum(pool.num_used for pool in pools),
        kv_blocks_cached=sum(pool.num_cached for pool in pools),
        prefix_cache_queries=sum(pool.total_queried_tokens for pool in pools),
        prefix_cache_hits=sum(pool.total_hit_tokens for pool in pools),
        num_preemptions=stats["total_preemptions"],
        num_prefill_tokens=stats["total_prefill_tokens"],
        num_decode_tokens=stats["total_decode_tokens"],
        num_steps=engine.num_steps,
        transfers=stats["total_migrations"],
        workers=[WorkerLoad(one.number, one.role, one.state, one.epoch, one.num_requests) for one in engine.workers()],
    )


def describe(llm: LLM, mode: str, policy: str, max_num_seqs: int) -> Ready:
    """The first message of an engine that is built."""
    model = llm.model
    if model.num_parameters:
        choices = [
            f"{model.layout.name}: {model.num_parameters:,} parameters, {model.dtype}, {model.device}",
            f"kernels: {llm.compiler.planner.name}, {_in_python(llm)}",
            *(f"weights: {one}" for one in llm.weight_stats()),
        ]
    else:
        choices = [f"{model.layout.name}: weights and kernels in worker processes"]
    if not model.generates:
        return Ready(model.layout.name, model.config.V, False, model.max_model_len, choices=choices)
    engine, size = llm.engine, llm.kv_cache_size
    return Ready(
        layout=model.layout.name,
        vocab_size=model.config.V,
        generates=True,
        max_model_len=model.max_model_len,
        max_seq_len=engine.max_seq_len,
        max_kv_tokens=engine.max_kv_tokens,
        num_kv_blocks=size.num_blocks,
        block_size=size.block_size,
        max_num_seqs=max_num_seqs,
        mode=mode,
        policy=policy,
        eos_ids=sorted(engine.eos_ids),
        choices=[*choices, f"{size}", f"mode {mode}, policy {policy}, at most {max_num_seqs} requests per step"],
    )


def _in_python(llm: LLM) -> str:
    """The ops of the graphs so far that have no native kernel, with the reasons."""
    reasons = {op: reason for stats in llm.kernel_stats() for op, (_, reason) in stats.in_python.items()}
    found = "; ".join(f"{op} in Python: {reason}" for op, reason in sorted(reasons.items()))
    return found or "all ops native"


def warm_up(llm: LLM) -> None:
    """Runs a prefill, a decode and a step with both, so that the first requests do not wait for plans and memory."""
    if not llm.model.generates:
        return
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    for name in ("warm-up/0", "warm-up/1"):
        llm.engine.add(name, None, [0], params)
        llm.engine.step()
        llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()
