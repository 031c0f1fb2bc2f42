"""A stand-in for the engine: it runs what the scheduler plans on a KV cache of token numbers, and checks every step."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from sageLLM.runtime.scheduler.base import Batch, Chunk, Request, RequestStatus, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler


def next_token(tokens: list[int]) -> int:
    """The "model": a token that depends on every token before it, so a wrong replay shows."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1009
    return value


def prefix_names(tokens: list[int]) -> list[int]:
    """What the cache holds at each position: a number that stands for all tokens up to there."""
    names, name = [], 0
    for token in tokens:
        name = hash((name, token))
        names.append(name)
    return names


@dataclass
class FakeEngine:
    """Runs a scheduler step by step. A cache slot holds the name of all tokens up to its own, or nothing.

    `computed` is the engine's own count of each request's tokens in the cache, `ends` how often each was ended.
    """

    scheduler: PDScheduler
    prefill_cache: dict[tuple[int, int], int] = field(default_factory=dict)
    decode_cache: dict[tuple[int, int], int] = field(default_factory=dict)
    stop_after: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    tables: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    victims: dict[str, int] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    steps: list[ScheduleOutput] = field(default_factory=list)

    def add(
        self,
        request_id: str,
        prompt_len: int,
        num_outputs: int = 4,
        max_new_tokens: int = 256,
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        first_token: int | None = None,
        salt: str = "",
    ) -> Request:
        """Queue a request that stops after `num_outputs` tokens. Those of equal `first_token` have equal beginnings."""
        start = sum(map(ord, request_id)) if first_token is None else first_token
        prompt = [(start + i) % 1009 for i in range(prompt_len)]
        request = Request(
            request_id, prompt, max_new_tokens, priority=priority, tenant=tenant, deadline=deadline, salt=salt
        )
        self.scheduler.add_request(request)
        self.requests[request_id], self.stop_after[request_id] = request, num_outputs
        return request

    def plan(self, is_ahead: bool = False, role: str | None = None) -> ScheduleOutput:
        """Plan a step, and note the block tables as they are: a device reads them when the step is launched."""
        out = self.scheduler.plan_ahead() if is_ahead else self.scheduler.schedule(role)
        self.scheduler.check_integrity()
        for request in out.preempted_requests:
            self.victims[request.request_id] = out.step_id
            self.cached.pop(request.request_id, None)
        for request_id, num_tokens in out.num_cached_tokens.items():
            self.cached[request_id] = num_tokens
            if request_id not in self.victims:
                self.computed[request_id] = num_tokens
        for batch in (out.prefill_batch, out.decode_batch):
            for request in batch.requests if batch else ():
                self.tables[out.step_id, request.request_id] = list(request.kv_block_ids)
        self.steps.append(out)
        return out

    def run(self, out: ScheduleOutput) -> list[str]:
        """Execute the plan; returns the ids that finished."""
        for request_id, step_id in list(self.victims.items()):
            if step_id <= out.step_id:
                self.computed[request_id] = self.cached.pop(request_id, 0)
                del self.victims[request_id]
        is_strict = self.scheduler.config.mode == "strict"
        finished = self._run_batch(out, out.prefill_batch, self.prefill_cache if is_strict else self.decode_cache)
        finished += self._run_batch(out, out.decode_batch, self.decode_cache)
        self._copy(out)
        return finished

    def commit(self, out: ScheduleOutput, finished: list[str], pending: Iterable[str] = ()) -> None:
        live_before = {*self.scheduler.running_requests, *(r.request_id for r in self.scheduler.waiting_queue)}
        ended = self.scheduler.update_after_step(finished, tuple(pending), step_id=out.step_id)
        self.scheduler.check_integrity()
        for request_id in {i for i in finished if i in live_before} | set(ended):
            self.ends[request_id] = self.ends.get(request_id, 0) + 1
        for request_id, request in self.scheduler.running_requests.items():
            assert request.num_computed_tokens == self.computed.get(request_id, 0), f"{request_id}: a gap or a repeat"

    def step(self) -> ScheduleOutput:
        out = self.plan()
        self.commit(out, self.run(out))
        return out

    def run_to_end(self, max_steps: int = 10_000) -> int:
        """Run until nothing is left; returns the number of steps."""
        for num_steps in range(max_steps):
            if not (self.scheduler.running_requests or len(self.scheduler.waiting_queue)):
                return num_steps
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.scheduler.get_stats()}")

    def expected_output(self, request: Request) -> list[int]:
        """What the request must have emitted by now, whatever preemption and migration did."""
        tokens = list(request.prompt_token_ids)
        for _ in request.output_token_ids:
            tokens.append(next_token(tokens))
        return tokens[request.num_prompt_tokens :]

    def _run_batch(self, out: ScheduleOutput, batch: Batch | None, cache: dict[tuple[int, int], int]) -> list[str]:
        if batch is None:
            return []
        assert [chunk.request for chunk in batch.chunks] == batch.requests
        ids = [c.request.request_id for c in batch.chunks if self._run_chunk(out.step_id, c, cache)]
        for request in batch.requests:
            del self.tables[out.step_id, request.request_id]
        return ids

    def _run_chunk(self, step_id: int, chunk: Chunk, cache: dict[tuple[int, int], int]) -> bool:
        request = chunk.request
        if request.status is RequestStatus.FINISHED:  # aborted while the step was in flight
            return False
        request_id, end = request.request_id, chunk.start + chunk.num_tokens
        assert chunk.num_tokens > 0
        assert chunk.start == self.computed.get(request_id, 0), f"{request_id} continues at {chunk.start}"
        assert chunk.is_last == (end == request.total_tokens)
        tokens = request.prompt_token_ids + request.output_token_ids
        names = prefix_names(tokens)
        for position in range(chunk.start, end):
            cache[self._slot(step_id, request_id, position)] = names[position]
        self.computed[request_id] = end
        if not chunk.is_last:
            return False
        seen = [cache.get(self._slot(step_id, request_id, position)) for position in range(end)]
        assert seen == names[:end], f"{request_id}: its KV is not where it decodes"
        request.output_token_ids.append(next_token(tokens))
        return request.num_output_tokens >= min(self.stop_after[request_id], request.max_new_tokens)

    def _copy(self, out: ScheduleOutput) -> None:
        for copy in out.kv_migrations:
            assert len(copy.source_blocks) == len(copy.target_blocks)
            for source, target in zip(copy.source_blocks, copy.target_blocks, strict=True):
                for offset in range(self.scheduler.kv.block_size):
                    if (source, offset) in self.prefill_cache:
                        self.decode_cache[target, offset] = self.prefill_cache[source, offset]

    def _slot(self, step_id: int, request_id: str, position: int) -> tuple[int, int]:
        block_size = self.scheduler.kv.block_size
        return self.tables[step_id, request_id][position // block_size], position % block_size


@pytest.fixture(scope="session")
def fake_engine() -> type[FakeEngine]:
    return FakeEngine
