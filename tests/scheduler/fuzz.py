"""Plays random schedules, each determined by its seed, and checks the invariants after every step.

    PYTHONPATH=_dev python tests/scheduler/fuzz.py --seeds 0:100000 --jobs 2     # play these, list the failures
    PYTHONPATH=_dev python tests/scheduler/fuzz.py --seed 4711                   # play one again, with its traceback

Pools are far too small on purpose. Requests arrive in bursts, with priorities, tenants, deadlines, shared prefixes and
forks; they are aborted at any time; steps fail; workers die; copies between workers are late, lost, repeated and out of
order; swaps fail; steps are planned ahead, or each worker steps at its own pace. Requests outgrow the length at which
their KV is recomputed.
"""

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date

from fake_engine import FakeEngine

from sageLLM.runtime.scheduler.base import KVBudget, KVMigration, Request, RequestStatus, ScheduleOutput
from sageLLM.runtime.scheduler.modes import ModeChoice, SchedulerView
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.transfer import TransferConfig

MAX_STEPS = 4000
SCHEDULES_PER_DAY = 1_000_000
CALM_AFTER = 200  # step after which nothing fails any more, so that every schedule ends


class RandomChooser:
    """Mode chooser for `auto`: any mode, any budget."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def observe(self, request: Request) -> None:
        assert request.rank is not None

    def choose(self, view: SchedulerView) -> ModeChoice:
        mode = self.rng.choice(["time_share", "hybrid", "prefill"])
        return ModeChoice(mode, self.rng.choice([None, 1, 3, 9]))


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Arrival:
    step: int
    prompt_len: int
    num_outputs: int
    max_new_tokens: int
    fields: dict[str, object]
    num_forks: int
    abort_after: int | None


@dataclass
class World:
    """One random schedule: its scheduler, its events, and the state of the invariants."""

    seed: int
    rng: random.Random = field(init=False)
    clock: Clock = field(default_factory=Clock)
    in_flight: list[tuple[float, KVMigration]] = field(default_factory=list)
    sent: list[KVMigration] = field(default_factory=list)
    num_restarts: int = 0
    aborts: dict[int, list[str]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    overtaken: Counter[str] = field(default_factory=Counter)
    starved: Counter[str] = field(default_factory=Counter)
    held: set[int] = field(default_factory=set)
    outputs: dict[str, int] = field(default_factory=dict)
    step_number: int = 0

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.echo = random.Random(-self.seed - 1)
        mode = rng.choice(["time_share", "hybrid", "strict", "auto"])
        self.is_strict = mode == "strict"
        self.pace = rng.choice(["sync", "sync", "ahead", "roles" if self.is_strict else "ahead"])
        self.config = self._config(mode)
        chooser = RandomChooser(rng) if mode == "auto" else None
        self.switch_len = random.Random(f"switch {self.seed}").choice([None, None, *range(1, 21, 2)])
        scheduler = PDScheduler(
            self.config,
            kv_budget=self._budget(),
            switch_len=self.switch_len,
            clock=self.clock,
            mode_chooser=chooser,
        )
        self.scheduler = scheduler
        self.engine = FakeEngine(scheduler, copies_at_once=False, checks_plans=rng.random() < 0.3)
        self.arrivals = [self._arrival() for _ in range(rng.randint(1, 8))]
        self.failure_rate = rng.choice([0, 0, 0, 0.05, 0.2])
        self.death_rate = rng.choice([0, 0, 0, 0.04])
        self.loss_rate = rng.choice([0, 0, 0.1, 0.4])
        self.copy_delay = rng.choice([0, 0, 1, 4])

    def _config(self, mode: str) -> PDSchedulerConfig:
        rng = self.rng
        lease = rng.choice([None, 2.5])
        transfer = TransferConfig(
            stream=rng.random() < 0.7,
            lease_s=lease,
            max_attempts=rng.randint(1, 3),
            num_ranks=rng.randint(1, 2),
            num_layers=rng.randint(1, 2),
            by_layer=random.Random(f"layers {self.seed}").random() < 0.5,
        )
        return PDSchedulerConfig(
            mode=mode,
            max_prefill_batch_size=rng.randint(1, 4),
            max_prefill_tokens=rng.randint(2, 24),
            prefill_chunk_size=rng.randint(1, 16),
            max_decode_batch_size=rng.randint(1, 5),
            enable_preemption=rng.random() < 0.8,
            preemption_mode=rng.choice(["swap", "recompute"]),
            max_consecutive_decodes=rng.randint(0, 4),
            policy=rng.choice(["fcfs", "priority", "deadline", "fair_share"]),
            max_overtakes=rng.randint(1, 4),
            max_decode_context_tokens=rng.choice([None, None, None, 20]),
            transfer=transfer,
            enable_prefix_caching=rng.random() < 0.6,
        )

    def _budget(self) -> KVBudget:
        rng = self.rng
        size = rng.choice([1, 2, 4, 5])
        least = -(-24 // size)  # too few for all tokens of the longest requests
        num_blocks = rng.randint(least, 2 * least)
        tiers = {"num_host_blocks": rng.choice([0, 3, 40]), "num_disk_blocks": rng.choice([0, 0, 30])}
        return KVBudget(num_blocks, size, rng.choice([None, least, 3 * least]), **tiers)

    def _arrival(self) -> Arrival:
        rng = self.rng
        fields = {
            "priority": rng.choice([0, 0, 0, 1, -1]),
            "tenant": rng.choice(["", "a", "b"]),
            "deadline": rng.choice([None, float(rng.randint(0, 40))]),
            "first_token": rng.randint(0, 2),
            "salt": rng.choice(["", "", "", "s"]),
        }
        num_forks = rng.choice([0, 0, 0, 1, 2])
        abort_after = rng.choice([None] * 5 + [0, 1, 4, 9])
        step = rng.choice([0, 0, rng.randint(0, 12)])
        return Arrival(
            step, rng.randint(1, 20), rng.randint(1, 9), rng.choice([9, 1, 4]), fields, num_forks, abort_after
        )

    # --- events ---

    def play(self) -> None:
        last_arrival = max(arrival.step for arrival in self.arrivals)
        for step in range(MAX_STEPS):
            self.step_number = step
            if step == CALM_AFTER:
                self.failure_rate = self.death_rate = self.loss_rate = 0
            self._let_arrive(step)
            is_live = self.scheduler.get_num_running() or self.scheduler.get_num_waiting()
            if step > last_arrival and not (is_live or self._is_settling()):
                break
            self._step_by_pace()
            self.clock.now += 1.0
            self._deliver()
            self._check_outputs()
        else:
            raise AssertionError(f"not done after {MAX_STEPS} steps: {self.scheduler.get_stats()}")
        self._check_end()

    def _is_settling(self) -> bool:
        """Whether messages are in flight (lost ones excepted), or blocks wait for the end of a copy or lease."""
        is_expected = any(at < float("inf") for at, _ in self.in_flight)
        stats = self.scheduler.get_stats()
        return is_expected or bool(stats["kv_blocks_used"] or stats.get("prefill_kv_blocks_used", 0))

    def _let_arrive(self, step: int) -> None:
        for number, arrival in enumerate(self.arrivals):
            if arrival.step != step:
                continue
            parent: Request | None = None
            for index in range(arrival.num_forks + 1):
                name = f"r{number}.{index}"
                num_outputs = arrival.num_outputs + index
                request = self.engine.add(
                    name, arrival.prompt_len, num_outputs, arrival.max_new_tokens, fork_of=parent, **arrival.fields
                )
                parent = parent or request
            if arrival.abort_after is not None:
                index = self.rng.randint(0, arrival.num_forks)
                self.aborts.setdefault(step + arrival.abort_after, []).append(f"r{number}.{index}")

    def _step_by_pace(self) -> None:
        if self.pace == "ahead":
            self._step_ahead()
        elif self.pace == "roles":
            self._step_apart()
        else:
            out = self._plan()
            if out is not None:
                self._abort_some()
                self._finish(out)

    def _plan(self, is_ahead: bool = False, role: str | None = None) -> ScheduleOutput | None:
        """Plan a step, which may fail before it starts; None if the worker dies."""
        while True:
            running_before = set(self.scheduler.running_requests)
            waiting_before = {r.request_id: r for r in self.scheduler.waiting_queue}
            out = self.engine.plan(is_ahead, role)
            self._check_plan(out, running_before, role)
            self._count_overtakes(waiting_before)
            if self.rng.random() < self.death_rate:
                self._die(role)
                return None
            if self.rng.random() >= self.failure_rate:
                self._replay_announcements(out)
                return out
            if is_ahead:
                self.scheduler.rollback_ahead()
            elif role is None:
                self.scheduler.rollback_step()
                self._fail_swaps(out)
            else:
                continue  # planning this worker's step again rolls back the failed one
            self.scheduler.check_integrity()

    def _fail_swaps(self, out: ScheduleOutput) -> None:
        if out.tier_copies and self.rng.random() < 0.5:
            self.scheduler.fail_swaps([copy.seq_id for copy in out.tier_copies])
            self.engine.forget_waiting()

    def _finish(self, out: ScheduleOutput) -> None:
        finished = self.engine.run(out)
        self._send(out.kv_migrations)
        self._answer(out.migrations_to_cancel)
        self.engine.commit(out, finished, pending=[piece.request_id for piece in out.kv_migrations])

    def _step_ahead(self) -> None:
        """The pending step (if any) ends after the next one is planned."""
        pending = [step.output for step in self.scheduler._steps.pending]
        if not pending:
            if self._plan() is None:
                return
            pending = [step.output for step in self.scheduler._steps.pending]
        if self.rng.random() < 0.8 and self._plan(is_ahead=True) is None:
            return
        self._abort_some()
        self._finish(pending[0])

    def _step_apart(self) -> None:
        """Each worker plans and ends steps at its own pace."""
        for role in ("prefill", "decode"):
            pending = {step.role: step.output for step in self.scheduler._steps.pending}
            if role in pending:
                if self.rng.random() < 0.5:
                    self._finish(pending[role])
            else:
                self._plan(role=role)
        self._abort_some()

    def _abort_some(self) -> None:
        for request_id in self.aborts.pop(self.step_number, ()):
            if self.scheduler.abort_request(request_id):
                self.aborted.add(request_id)
                self.scheduler.check_integrity()

    def _die(self, role: str | None) -> None:
        dead = self.rng.choice(["prefill", "decode", None]) if self.is_strict else None
        if dead == "prefill" and role is None and self.pace == "ahead":
            dead = None
        self.num_restarts += len(self.scheduler.running_requests)
        self.scheduler.lose_kv(dead)
        if dead != "decode":
            self.engine.prefill_cache.clear()
        if dead != "prefill":
            self.engine.decode_cache.clear()
            for tier in self.engine.tiers.values():
                tier.clear()
        self.in_flight.clear()
        self.engine.forget_waiting()
        self.scheduler.check_integrity()

    # --- transport between the workers ---

    def _send(self, pieces: list[KVMigration]) -> None:
        for piece in pieces:
            self.in_flight.append((self.clock.now + self.rng.randint(0, self.copy_delay), piece))
        self.sent += pieces

    def _deliver(self) -> None:
        due = [entry for entry in self.in_flight if entry[0] <= self.clock.now]
        self._repeat_old_messages()
        self.rng.shuffle(due)
        for entry in due:
            if entry not in self.in_flight:
                continue
            piece = entry[1]
            if self.rng.random() < self.loss_rate:
                if self.config.transfer.lease_s is None:
                    self._fail(piece.request_id)
                else:
                    self.in_flight.remove(entry)
                    self.in_flight.append((float("inf"), piece))  # lost without a report
                continue
            self.in_flight.remove(entry)
            self.engine.migrate(piece)
            self._acknowledge(piece)
        self.engine.forget_waiting()

    def _repeat_old_messages(self) -> None:
        """Repeat messages of earlier attempts, and from before a recomputation."""
        in_flight = [piece for _, piece in self.in_flight]
        for piece in self.sent[-8:]:
            if piece not in in_flight and self.echo.random() < 0.3:
                self.scheduler.acknowledge_migration(piece.request_id, piece.start, piece.attempt)
        self.scheduler.check_integrity()

    def _acknowledge(self, piece: KVMigration) -> None:
        transfer = self.config.transfer
        parts = [(rank, layer) for rank in range(transfer.num_ranks) for layer in range(transfer.num_layers)]
        parts += self.rng.choices(parts, k=self.rng.randint(0, 2))
        self.rng.shuffle(parts)
        for rank, layer in parts:
            self.scheduler.acknowledge_migration(piece.request_id, piece.start, piece.attempt, rank, [layer])
        if self.rng.random() < 0.2:  # a message of an unknown attempt
            self.scheduler.acknowledge_migration(piece.request_id, piece.start, piece.attempt + 7)
        self.scheduler.check_integrity()

    def _answer(self, to_cancel: list[KVMigration]) -> None:
        for request_id in {piece.request_id: None for piece in to_cancel}:
            self._fail(request_id)

    def _fail(self, request_id: str) -> None:
        self.in_flight = [entry for entry in self.in_flight if entry[1].request_id != request_id]
        self.num_restarts += 1
        self.scheduler.fail_migrations([request_id])
        self.scheduler.check_integrity()

    # --- invariants ---

    def _check_plan(self, out: ScheduleOutput, running_before: set[str], role: str | None) -> None:
        prefill = out.prefill_batch.chunks if out.prefill_batch else []
        decode = out.decode_batch.chunks if out.decode_batch else []
        ids = [c.request.request_id for c in [*prefill, *decode]]
        assert len(set(ids)) == len(ids), "a request is twice in a step"
        victims = {r.request_id for r in out.preempted_requests}
        assert not victims & set(ids), "a victim is still in the plan"
        assert not (victims and not self.config.enable_preemption), "a preemption although it is disabled"
        if self.pace == "sync":
            assert all(c.request.status is RequestStatus.PREFILLING for c in prefill)
            assert all(c.request.status is RequestStatus.DECODING for c in decode)
        assert all(c.num_tokens == 1 for c in decode)
        swapped_in = {copy.seq_id for copy in out.tier_copies if copy.target == "device"}
        newcomers = set(self.scheduler.running_requests) - running_before - swapped_in
        assert not (newcomers and victims), "a preempting step admits"
        self._check_budgets(prefill, decode)
        if role is not None:
            assert not (prefill if role == "decode" else decode), "the wrong worker's work"
        self._check_round_robin(ids, decode)

    def _check_budgets(self, prefill: list, decode: list) -> None:
        config = self.config
        num_prefill_tokens = sum(c.num_tokens for c in prefill)
        assert len(prefill) <= config.max_prefill_batch_size
        assert len(decode) <= config.max_decode_batch_size
        assert num_prefill_tokens <= config.max_prefill_tokens
        assert self.scheduler.get_num_running() <= self.scheduler.max_batch_size
        if config.max_decode_context_tokens is not None and len(decode) > 1:
            assert sum(c.start + 1 for c in decode) <= config.max_decode_context_tokens
        if config.mode == "hybrid":
            assert num_prefill_tokens <= config.prefill_chunk_size
        if config.mode == "hybrid" or (config.mode == "auto" and prefill and decode):
            assert num_prefill_tokens + len(decode) <= config.max_prefill_tokens
        if config.mode == "time_share":
            assert not (prefill and decode)

    def _check_round_robin(self, served: list[str], decode: list) -> None:
        """Every decode is served again within the steps that all the others need."""
        if not decode:
            return
        queue = [r.request_id for r in self.scheduler.decode_queue]
        self.starved = Counter({i: self.starved[i] for i in queue if i not in served})
        for request_id in queue:
            if request_id not in served:
                self.starved[request_id] += 1
                assert self.starved[request_id] <= 60, f"{request_id} starves"

    def _count_overtakes(self, waiting_before: dict[str, Request]) -> None:
        still = {r.request_id for r in self.scheduler.waiting_queue}
        admitted = [r.sequence_number for i, r in waiting_before.items() if i not in still]
        for request_id in [i for i in waiting_before if i in still]:
            number = waiting_before[request_id].sequence_number
            self.overtaken[request_id] += sum(other > number for other in admitted)
            num_older = sum(r.sequence_number < number for r in waiting_before.values())
            bound = (self.config.max_overtakes + 1) * (num_older + 2 + len(self.arrivals) * 3)
            bound += self.num_restarts  # a request recomputed after a failure overtakes again
            assert self.overtaken[request_id] <= bound, f"{request_id} is overtaken without bound"

    def _replay_announcements(self, out: ScheduleOutput) -> None:
        """Check that a KV runtime that sees only the outputs has a consistent view of the decode pool."""
        freed = set(out.kv_blocks_to_free)
        if self.pace == "roles":  # a step that fails after a later one of the other worker repeats its blocks
            return
        assert len(freed) == len(out.kv_blocks_to_free), "a block is freed twice"
        if self.is_strict or self.pace != "sync":
            return
        assert self.held.issuperset(freed), "a block is freed that was never announced"
        self.held -= freed
        for blocks in out.kv_blocks_to_allocate.values():
            assert self.held.isdisjoint(blocks), "a block is announced twice"
            self.held.update(blocks)

    def _check_outputs(self) -> None:
        for request_id, request in self.engine.requests.items():
            num = request.num_output_tokens
            assert num >= self.outputs.get(request_id, 0), "output shrank"
            assert request.status is not RequestStatus.FINISHED or request_id not in self.scheduler.running_requests
            self.outputs[request_id] = num

    def _check_end(self) -> None:
        engine, scheduler = self.engine, self.scheduler
        scheduler.rollback_step()
        for request_id, request in engine.requests.items():
            num_ends = engine.ends.get(request_id, 0) + (request_id in self.aborted)
            assert num_ends == 1, f"{request_id} ended {num_ends} times"
            assert request.status is RequestStatus.FINISHED
            if request_id in self.aborted:
                continue
            assert request.output_token_ids == engine.expected_output(request), f"{request_id}: wrong tokens"
            expected = min(engine.stop_after[request_id], request.max_new_tokens)
            most = scheduler.max_seq_len - request.num_prompt_tokens
            assert request.num_output_tokens == min(expected, most), f"{request_id}: {request.num_output_tokens} tokens"
        stats, kv = scheduler.get_stats(), scheduler.kv.decode.stats()
        assert stats["kv_blocks_used"] == stats.get("prefill_kv_blocks_used", 0) == 0, "blocks leaked"
        assert (kv.num_host_used, kv.num_disk_used, kv.num_in_transfer) == (0, 0, 0), "tier blocks leaked"
        assert stats["total_finished"] + stats["total_aborted"] == len(engine.requests)
        scheduler.schedule()
        self.held.difference_update(scheduler.schedule().kv_blocks_to_free)
        assert not self.held, "blocks were announced and never freed"


def play(seed: int) -> None:
    """Play one schedule. Raises AssertionError (or an error of the scheduler) if an invariant is violated."""
    World(seed).play()


def failing_seeds(seeds: range) -> Iterator[tuple[int, str]]:
    """The failing seeds, with the reason."""
    for seed in seeds:
        try:
            play(seed)
        except Exception as error:  # report the seed of any failure
            yield seed, f"{type(error).__name__}: {error}".splitlines()[0][:200]


def play_all(seeds: range) -> list[tuple[int, str]]:
    return list(failing_seeds(seeds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="play this one and show its traceback")
    parser.add_argument("--seeds", help="play these, FROM:TO; by default a million, other ones every day")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    if args.seed is not None:
        try:
            play(args.seed)
        except Exception:
            traceback.print_exc()
            return 1
        print(f"seed {args.seed}: no violation")
        return 0
    seeds = range(*map(int, args.seeds.split(":"))) if args.seeds else seeds_of_day()
    print(f"seeds {seeds.start}:{seeds.stop}", flush=True)
    return play_many(seeds, args.jobs)


def seeds_of_day() -> range:
    """Seeds of this day alone."""
    first = date.today().toordinal() * SCHEDULES_PER_DAY
    return range(first, first + SCHEDULES_PER_DAY)


def play_many(seeds: range, jobs: int) -> int:
    start, num_failed = time.monotonic(), 0
    parts = [seeds[i : i + 500] for i in range(0, len(seeds), 500)]
    with ProcessPoolExecutor(jobs) as pool:
        for number, failed in enumerate(pool.map(play_all, parts), 1):
            for seed, reason in failed:
                num_failed += 1
                print(f"seed {seed}: {reason}", flush=True)
            if number % 20 == 0:  # where to resume if this is interrupted
                print(f"played up to {parts[number - 1][-1] + 1}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    print(f"{len(seeds)} schedules, {num_failed} failed, {seconds:.0f} s")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
