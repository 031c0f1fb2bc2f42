"""Fake engine: executes the scheduler's steps on a KV cache of token hashes, and checks every step."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sageLLM.runtime.scheduler.base import Batch, Chunk, KVMigration, Request, RequestStatus, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler


def next_token(tokens: list[int]) -> int:
    """The "model": a token that depends on every token before it, so a wrong replay is detected."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1009
    return value


def chain(tokens: list[int], known: list[int], start: int) -> list[int]:
    """A hash for each token of `start`, it and all tokens before it; `known` are the hashes computed so far."""
    values = known
    value = values[-1] if values else start
    for token in tokens[len(values) :]:
        value = hash((value, token))
        values.append(value)
    return values


Cache = dict[int, list[int | None]]


@dataclass
class FakeEngine:
    """Runs a scheduler step by step, on caches that hold the `chain` hash of the token in each slot of a block.

    So a token at the wrong position, of the wrong request or after a different prefix is detected when it is read. The
    hashes of a sequence beyond the scheduler's `switch_len` are others than those of a shorter one.
    `computed` is the engine's own count of each request's tokens in the cache, `ends` how often each was ended.
    """

    scheduler: PDScheduler
    prefill_cache: Cache = field(default_factory=dict)
    decode_cache: Cache = field(default_factory=dict)
    tiers: dict[str, Cache] = field(default_factory=lambda: {"host": {}, "disk": {}})
    stop_after: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    chains: dict[tuple[str, bool], list[int]] = field(default_factory=dict)
    tables: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    victims: dict[str, int] = field(default_factory=dict)
    steps: list[ScheduleOutput] = field(default_factory=list)
    copies_at_once: bool = True
    checks_plans: bool = True
    launching: dict[str, int] = field(default_factory=dict)  # the step that admitted a request with cached tokens

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
        fork_of: Request | None = None,
    ) -> Request:
        """Queue a request that stops after `num_outputs` tokens. Requests of equal `first_token` share a prefix."""
        start = sum(map(ord, request_id)) if first_token is None else first_token
        prompt = [(start + i) % 1009 for i in range(prompt_len)]
        request = Request(
            request_id,
            prompt,
            max_new_tokens,
            priority=priority,
            tenant=tenant,
            deadline=deadline,
            salt=salt,
            fork_of=fork_of,
        )
        self.scheduler.add_request(request)
        self.requests[request_id], self.stop_after[request_id] = request, num_outputs
        return request

    def plan(self, is_ahead: bool = False, role: str | None = None) -> ScheduleOutput:
        """Plan a step, and copy the block tables: a device reads them when the step is launched."""
        out = self.scheduler.plan_ahead() if is_ahead else self.scheduler.schedule(role)
        if self.checks_plans:
            self.scheduler.check_integrity()
        swapped = {copy.seq_id for copy in out.tier_copies if copy.source == "device"}
        for request in (*out.preempted_requests, *out.requeued_requests):
            if request.request_id not in swapped:
                self.victims[request.request_id] = out.step_id
        for batch in (out.prefill_batch, out.decode_batch):
            for request in batch.requests if batch else ():
                self.tables[out.step_id, request.request_id] = list(request.kv_block_ids)
        self.launching.update(dict.fromkeys(out.num_cached_tokens, out.step_id))
        self.steps.append(out)
        return out

    def run(self, out: ScheduleOutput) -> list[str]:
        """Execute the plan; returns the ids that finished."""
        for request_id, step_id in list(self.victims.items()):
            if step_id <= out.step_id:
                self.computed[request_id] = 0
                del self.victims[request_id]
        self.computed.update(out.num_cached_tokens)
        for request_id in out.num_cached_tokens:
            if self.launching.get(request_id) == out.step_id:  # else a later step, planned already, admits it again
                del self.launching[request_id]
        self._copy_blocks(out)
        is_strict = self.scheduler.config.mode == "strict"
        finished = self._run_batch(out, out.prefill_batch, self.prefill_cache if is_strict else self.decode_cache)
        finished += self._run_batch(out, out.decode_batch, self.decode_cache)
        if self.copies_at_once:
            for copy in out.kv_migrations:
                self.migrate(copy)
        return finished

    def commit(self, out: ScheduleOutput, finished: list[str], pending: Iterable[str] = ()) -> None:
        scheduler = self.scheduler
        ended = scheduler.update_after_step(finished, tuple(pending), step_id=out.step_id)
        scheduler.check_integrity()
        self.forget_waiting()
        for request_id in {i for i in finished if i in self.requests} | set(ended):
            self.ends[request_id] = self.ends.get(request_id, 0) + 1
        for request_id, request in scheduler.running_requests.items():
            num_computed = self.computed.get(request_id, 0)
            if request_id not in self.launching:  # admitted with cached tokens by a step that has not begun
                assert request.num_computed_tokens == num_computed, f"{request_id}: a gap or a repeat"

    def forget_waiting(self) -> None:
        """Reset the count of requests that lost their KV."""
        for request in self.scheduler.waiting_queue:
            if request.num_computed_tokens == 0:
                self.computed[request.request_id] = 0

    def step(self) -> ScheduleOutput:
        out = self.plan()
        self.commit(out, self.run(out))
        return out

    def run_to_end(self, max_steps: int = 10_000) -> int:
        """Run until nothing is left; returns the number of steps."""
        for num_steps in range(max_steps):
            if not (self.scheduler.get_num_running() or self.scheduler.get_num_waiting()):
                return num_steps
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.scheduler.get_stats()}")

    def expected_output(self, request: Request) -> list[int]:
        """The tokens that the request must have emitted by now, whatever preemption and migration did."""
        tokens = list(request.prompt_token_ids)
        for _ in request.output_token_ids:
            tokens.append(next_token(tokens))
        return tokens[request.num_prompt_tokens :]

    def _run_batch(self, out: ScheduleOutput, batch: Batch | None, cache: Cache) -> list[str]:
        if batch is None:
            return []
        assert [chunk.request for chunk in batch.chunks] == batch.requests
        finished = []
        for chunk in batch.chunks:
            finished += self._run_chunk(out.step_id, chunk, cache)
        return finished

    def _run_chunk(self, step_id: int, chunk: Chunk, cache: Cache) -> list[str]:
        """Compute a chunk; returns the ids that have all their tokens now, of the request and its forks."""
        request = chunk.request
        request_id, end = request.request_id, chunk.start + chunk.num_tokens
        table = self.tables.pop((step_id, request_id))
        if request.status is RequestStatus.FINISHED:  # aborted while the step was pending
            return []
        if request.status is RequestStatus.PREEMPTED and not self.computed.get(request_id):  # its KV was lost meanwhile
            return []
        assert chunk.num_tokens > 0
        assert chunk.start == self.computed.get(request_id, 0), f"{request_id} continues at {chunk.start}"
        assert chunk.is_last == (end == request.total_tokens)
        values = self._values(request)
        self._write(cache, table, chunk.start, values[chunk.start : end])
        self.computed[request_id] = end
        if not chunk.is_last:
            return []
        assert self._read(cache, table, end) == values[:end], f"{request_id}: its KV is not where it decodes"
        forks = self.scheduler.forks_of(request_id)
        token = next_token(request.prompt_token_ids + request.output_token_ids)
        for receiver in (request, *forks):
            receiver.output_token_ids.append(token)
        for fork in forks:
            self.computed[fork.request_id] = end
        return [r.request_id for r in (request, *forks) if self._is_done(r)]

    def _is_done(self, request: Request) -> bool:
        return request.num_output_tokens >= min(self.stop_after[request.request_id], request.max_new_tokens)

    def _values(self, request: Request) -> list[int]:
        switch_len = self.scheduler.limits.switch_len
        is_long = switch_len is not None and request.total_tokens > switch_len
        known = self.chains.setdefault((request.request_id, is_long), [])
        return chain(request.prompt_token_ids + request.output_token_ids, known, int(is_long))

    def _write(self, cache: Cache, table: list[int], start: int, values: list[int]) -> None:
        size = self.scheduler.kv.block_size
        for position, value in enumerate(values, start):
            cache.setdefault(table[position // size], [None] * size)[position % size] = value

    def _read(self, cache: Cache, table: list[int], num_tokens: int) -> list[int | None]:
        size = self.scheduler.kv.block_size
        slots: list[int | None] = []
        for block in table[: -(-num_tokens // size)]:
            slots += cache.get(block, [None] * size)
        return slots[:num_tokens]

    def _copy_blocks(self, out: ScheduleOutput) -> None:
        cache = self.decode_cache
        for copy in out.block_copies:
            if copy.source in cache:
                cache[copy.target] = list(cache[copy.source])
        for swap in out.tier_copies:
            assert len(swap.source_blocks) == len(swap.target_blocks)
            source = cache if swap.source == "device" else self.tiers[swap.source]
            target = cache if swap.target == "device" else self.tiers[swap.target]
            for source_block, target_block in zip(swap.source_blocks, swap.target_blocks, strict=True):
                if source_block in source:  # a block of an aborted request may never have been written
                    target[target_block] = list(source[source_block])

    def migrate(self, copy: KVMigration) -> None:
        """Copy from the prefill to the decode worker."""
        assert len(copy.source_blocks) == len(copy.target_blocks)
        for source, target in zip(copy.source_blocks, copy.target_blocks, strict=True):
            self.decode_cache[target] = list(self.prefill_cache[source])
