"""Several engines as one: the requests are divided among workers that each have a scheduler and a KV cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.sequences import RequestGroup, RequestTraits
from sageLLM.runtime.engine.sequences import Sequence as Answer
from sageLLM.runtime.errors import EngineError
from sageLLM.runtime.grammar.compiler import TokenizerText
from sageLLM.runtime.kv.copies import KVStats
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler


class EngineGroup(Engine):
    """Engines of one model with workers that run at the same time, each its own steps (data parallelism).

    A request goes to the engine with the fewest sequences, and stays there.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        first = self.engines[0]
        self.model, self.tokenizer, self.is_strict, self.executor = (
            first.model,
            first.tokenizer,
            first.is_strict,
            first.executor,
        )
        self.num_steps = 0
        self._home: dict[str, Engine] = {}

    @property
    def has_work(self) -> bool:
        return any(engine.has_work for engine in self.engines)

    @property
    def num_sequences(self) -> int:
        return sum(engine.num_sequences for engine in self.engines)

    def kv_stats(self) -> dict[str, KVStats]:
        return {
            f"{name} {rank}": stats
            for rank, engine in enumerate(self.engines)
            for name, stats in engine.kv_stats().items()
        }

    def reset_prefix_cache(self) -> None:
        for engine in self.engines:
            engine.reset_prefix_cache()

    def scheduler_stats(self) -> dict[str, int]:
        total: Counter[str] = Counter()
        for engine in self.engines:
            total.update(engine.scheduler_stats())
        return dict(total)

    def prepare(
        self,
        group_id: str,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        traits: RequestTraits | None = None,
    ) -> RequestGroup:
        return self.engines[0].prepare(group_id, prompt, token_ids, params, traits)

    def add_eos_ids(self, token_ids: frozenset[int]) -> None:
        for engine in self.engines:
            engine.add_eos_ids(token_ids)

    def prepare_grammars(self, tokenizer: TokenizerText) -> None:
        for engine in self.engines:
            engine.prepare_grammars(tokenizer)

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.engines[0].eos_ids

    @property
    def max_kv_tokens(self) -> int | None:
        return self.engines[0].max_kv_tokens

    @property
    def max_seq_len(self) -> int:
        return self.engines[0].max_seq_len

    @property
    def scheduler(self) -> PDScheduler:
        """The scheduler of the first worker; all have the same config."""
        return self.engines[0].scheduler

    def submit(self, group: RequestGroup) -> None:
        engine = min(self.engines, key=lambda engine: engine.num_sequences)
        engine.submit(group)
        self._home[group.request_id] = engine

    def abort(self, group_id: str, reason: str = "aborted by the caller") -> RequestOutput | None:
        engine = self._home.pop(group_id, None)
        return None if engine is None else engine.abort(group_id, reason)

    def abort_answer(self, group_id: str, index: int, reason: str) -> None:
        if (engine := self._home.get(group_id)) is not None:
            engine.abort_answer(group_id, index, reason)

    def refuse(self, group: RequestGroup, error: BaseException) -> RequestOutput:
        return self.engines[0].refuse(group, error)

    def reset(self, error: BaseException) -> EngineError:
        self._home.clear()
        failures = [engine.reset(error) for engine in self.engines]
        return failures[0]

    def step(self, *, only_finished: bool = False) -> list[RequestOutput]:
        """Completes the steps of the workers that are done first, while those of the others run on."""
        outputs = [output for engine in self._ready() for output in engine.step(only_finished=only_finished)]
        self._forget_finished()
        return outputs

    def step_answers(self) -> list[Answer]:
        changed = [answer for engine in self._ready() for answer in engine.step_answers()]
        self._forget_finished()
        return changed

    def _ready(self) -> list[Engine]:
        """The engines with a step that is complete; waits until there is one."""
        busy = [engine for engine in self.engines if engine.has_work]
        steps = [engine.plan_steps() for engine in busy]
        futures = [step for step in steps if isinstance(step, Future)]  # those of worker processes
        if len(futures) == len(steps):
            wait(futures, return_when=FIRST_COMPLETED)
        pairs = zip(busy, steps, strict=True)
        ready = [engine for engine, step in pairs if not isinstance(step, Future) or step.done()]
        self.num_steps += len(ready)
        return ready

    def _forget_finished(self) -> None:
        self._home = {group_id: engine for group_id, engine in self._home.items() if engine.is_live(group_id)}

    def wait(self) -> None:
        for engine in self.engines:
            engine.wait()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
