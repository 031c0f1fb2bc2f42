"""Compares the modes of `PDScheduler` with the running-first policy (vLLM v1's) on fixed loads, counted in steps.

    python benchmarks/policies.py

Nothing is computed: all steps take equally long, and a request yields a token with its last chunk. TTFT is counted in
steps from arrival to the first token, TPOT in steps per further token. All schedulers have the same token budget per
step, the same batch size and the same KV pool.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from sageLLM.runtime.scheduler.base import BaseScheduler, KVBudget, Request, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.sim.baselines.running_first import RunningFirstConfig, RunningFirstScheduler


@dataclass(frozen=True)
class Load:
    """Requests as (step of arrival, prompt tokens, output tokens), and the number of KV blocks of 16 tokens."""

    arrivals: tuple[tuple[int, int, int], ...]
    num_blocks: int
    max_tokens: int = 512
    max_requests: int = 64


@dataclass(frozen=True)
class Row:
    """Result of a scheduler on a load."""

    steps: int
    ttft: float
    tpot: float
    preemptions: int


def loads() -> dict[str, Load]:
    """The fixed loads, by name."""
    rng = random.Random(7)

    def arrivals(num: int, gap: float, prompt: tuple[int, int], output: tuple[int, int]) -> tuple:
        step, drawn = 0.0, []
        for _ in range(num):
            step += rng.expovariate(1 / gap) if gap else 0.0
            drawn.append((int(step), rng.randint(*prompt), rng.randint(*output)))
        return tuple(drawn)

    return {
        "chat, steady": Load(arrivals(200, 3.0, (20, 400), (10, 120)), 2000),
        "chat, one burst": Load(arrivals(120, 0.0, (20, 400), (10, 120)), 2000),
        "long prompts": Load(arrivals(60, 12.0, (1000, 4000), (10, 60)), 4000),
        "long outputs, tight memory": Load(arrivals(80, 1.0, (20, 60), (150, 400)), 320),
        "burst, tight memory": Load(arrivals(100, 0.0, (50, 200), (50, 200)), 400),
        "mixed lengths": Load(arrivals(150, 4.0, (10, 1500), (5, 150)), 1500),
    }


def running_first(load: Load) -> RunningFirstScheduler:
    config = RunningFirstConfig(load.max_requests, load.max_tokens, enable_prefix_caching=False)
    return RunningFirstScheduler(config, kv_budget=KVBudget(load.num_blocks))


def pd(mode: str) -> Callable[[Load], PDScheduler]:
    """A factory of PD schedulers in this mode, with the load's budgets."""

    def make(load: Load) -> PDScheduler:
        config = PDSchedulerConfig(
            mode=mode,
            max_prefill_tokens=load.max_tokens,
            prefill_chunk_size=load.max_tokens,
            max_prefill_batch_size=load.max_requests,
            max_decode_batch_size=load.max_requests,
            enable_prefix_caching=False,
        )
        return PDScheduler(config, kv_budget=KVBudget(load.num_blocks))

    return make


SCHEDULERS: dict[str, Callable[[Load], RunningFirstScheduler | PDScheduler]] = {
    "running-first": running_first,
    "hybrid": pd("hybrid"),
    "time_share": pd("time_share"),
}


def play(scheduler: RunningFirstScheduler | PDScheduler, load: Load) -> Row:
    """Serve the whole load."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    waiting = list(enumerate(load.arrivals))[::-1]
    step = 0
    while waiting or scheduler.get_num_running() or scheduler.get_num_waiting():
        while waiting and waiting[-1][1][0] <= step:
            number, (_, num_prompt, num_outputs) = waiting.pop()
            scheduler.add_request(Request(str(number), [number] * num_prompt, num_outputs))
        step += 1
        for request in _served(scheduler):
            first.setdefault(request.request_id, step)
            last[request.request_id] = step
    ttft = mean(first[str(i)] - arrival for i, (arrival, _, _) in enumerate(load.arrivals))
    tpot = mean((last[str(i)] - first[str(i)]) / max(1, num - 1) for i, (_, _, num) in enumerate(load.arrivals))
    return Row(step, ttft, tpot, scheduler.get_stats()["total_preemptions"])


def _served(scheduler: BaseScheduler) -> list[Request]:
    out: ScheduleOutput = scheduler.schedule()
    batches = [batch for batch in (out.prefill_batch, out.decode_batch) if batch]
    served = [chunk.request for batch in batches for chunk in batch.chunks if chunk.is_last]
    for request in served:
        request.output_token_ids.append(0)
    scheduler.update_after_step([r.request_id for r in served if r.num_output_tokens >= r.max_new_tokens])
    return served


def measure() -> dict[str, dict[str, Row]]:
    """All loads under all schedulers."""
    return {name: {s: play(make(load), load) for s, make in SCHEDULERS.items()} for name, load in loads().items()}


def main() -> None:
    print("| load | scheduler | steps | TTFT | TPOT | preemptions |")
    print("|---|---|---|---|---|---|")
    for name, rows in measure().items():
        for scheduler, row in rows.items():
            print(f"| {name} | {scheduler} | {row.steps} | {row.ttft:.2f} | {row.tpot:.3f} | {row.preemptions} |")


if __name__ == "__main__":
    main()
