"""Measures the scheduler's time per step: schedule + update_after_step in microseconds, without an engine.

    python benchmarks/scheduler.py [--steps N] [--out FILE]

Each case runs requests that decode indefinitely (and, in the mixed cases, one prompt after another in chunks of 512
tokens) for `--steps` steps after 200 warm-up steps. It reports p5, p50 and p99 for both calls together, and p50 for
each; `chunks` also reads every chunk of the decode batch, which the scheduler builds only on demand. Tokens are
appended to the requests between the two calls, untimed, as an engine would.

In the `churn` cases one request ends and one arrives in every step, with a prompt of 64 tokens (in `churn_shared` its
first 48 are cached). Timed are `add_request`, both calls, and between them appending a token to every request and
checking it for a stop, with the garbage collector on.
"""

import argparse
import gc
import json
import time
from pathlib import Path

from sageLLM.runtime.scheduler.base import KVBudget, Request, ScheduleOutput
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig

CHUNK = 512
PROMPT = 64
WARM_UP = 200
SIZES = (1, 64, 256, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="also write the figures and the machine's description to this file")
    args = parser.parse_args()
    figures = measure(args.steps)
    for name, row in figures.items():
        print(f"{name:<34}", "  ".join(f"{key} {value:8.1f}" for key, value in row.items()))
    if args.out:
        from machine import machine_facts  # imports torch, which the measurement does not need

        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine_facts(), "figures": figures}, indent=1) + "\n", "utf-8")


def measure(steps: int) -> dict[str, dict[str, float]]:
    """All cases by name; microseconds per step."""
    figures: dict[str, dict[str, float]] = {}
    for size in SIZES:
        figures[f"decode_{size}"] = Case(size).measure(steps)
        figures[f"decode_{size}_no_prefix_cache"] = Case(size, is_caching=False).measure(steps)
        figures[f"decode_{size}_chunks"] = Case(size, reads_chunks=True).measure(steps)
        figures[f"mixed_{size}"] = Case(size, is_mixed=True).measure(steps)
        figures[f"mixed_{size}_no_prefix_cache"] = Case(size, is_mixed=True, is_caching=False).measure(steps)
    for size in SIZES[1:]:
        figures[f"churn_{size}"] = Churn(size).measure(steps)
    figures["churn_256_shared"] = Churn(256, is_shared=True).measure(steps)
    figures["churn_256_no_prefix_cache"] = Churn(256, is_caching=False).measure(steps)
    figures["decode_256_waiting_10000"] = Case(256, num_waiting=10_000).measure(steps)
    figures["decode_256_plan_ahead"] = Case(256, is_ahead=True).measure(steps)
    per_request = (figures["decode_1024"]["p50"] - figures["decode_64"]["p50"]) / (1024 - 64)
    figures["growth_per_request"] = {"p50": round(per_request, 4)}
    return figures


class Case:
    """One load: `size` decodes, optionally with a prompt being prefilled or a long waiting queue."""

    def __init__(
        self,
        size: int,
        *,
        is_mixed: bool = False,
        num_waiting: int = 0,
        reads_chunks: bool = False,
        is_ahead: bool = False,
        is_caching: bool = True,
    ) -> None:
        self.is_mixed = is_mixed
        self.reads_chunks = reads_chunks
        self.is_ahead = is_ahead
        config = PDSchedulerConfig(
            mode="hybrid",
            max_prefill_tokens=4096 + CHUNK,
            prefill_chunk_size=CHUNK,
            max_prefill_batch_size=size + is_mixed,
            max_decode_batch_size=size + is_mixed,
            enable_prefix_caching=is_caching,
        )
        self.scheduler = PDScheduler(config, kv_budget=KVBudget(num_blocks=4_000_000, block_size=16))
        self.num_prompts = 0
        for i in range(size):
            self.scheduler.add_request(Request(f"r{i}", [i % 101] * PROMPT, max_new_tokens=10**9))
        while self.scheduler.waiting_queue or self.scheduler.get_stats()["prefill_queue_size"]:
            self._step()
        for i in range(num_waiting):
            self.scheduler.add_request(Request(f"w{i}", [i % 101] * PROMPT, max_new_tokens=10**9))

    def measure(self, steps: int) -> dict[str, float]:
        """Measure p5, p50 and p99 of a step, and p50 of both calls."""
        if self.is_ahead:
            self.scheduler.schedule()
        for _ in range(WARM_UP):
            self._step()
        gc.collect()
        gc.freeze()
        times = [self._step() for _ in range(steps)]
        gc.unfreeze()
        total = [plan + commit for plan, commit in times]
        row = {f"p{percent}": _percentile(total, percent) for percent in (5, 50, 99)}
        row["schedule"] = _percentile([plan for plan, _ in times], 50)
        row["update"] = _percentile([commit for _, commit in times], 50)
        return row

    def _step(self) -> tuple[float, float]:
        """Plan and commit one step; returns the microseconds of each call."""
        self._keep_a_prompt()
        begin = time.perf_counter()
        out = self.scheduler.plan_ahead() if self.is_ahead else self.scheduler.schedule()
        if self.reads_chunks and out.decode_batch:
            _ = out.decode_batch.chunks
        planned = time.perf_counter()
        finished = self._append_tokens(out)
        resumed = time.perf_counter()
        self.scheduler.update_after_step(finished)
        return 1e6 * (planned - begin), 1e6 * (time.perf_counter() - resumed)

    def _keep_a_prompt(self) -> None:
        if self.is_mixed and not self.scheduler.get_stats()["prefill_queue_size"]:
            self.num_prompts += 1
            prompt = [self.num_prompts * CHUNK + i for i in range(8 * CHUNK)]  # not cached
            self.scheduler.add_request(Request(f"p{self.num_prompts}", prompt))

    def _append_tokens(self, out: ScheduleOutput) -> list[str]:
        """Do the engine's part between the two calls; long prompts end with their first token."""
        for request in out.decode_batch.requests if out.decode_batch else ():
            request.output_token_ids.append(1)
        last = [c.request for c in out.prefill_batch.chunks if c.is_last] if out.prefill_batch else []
        for request in last:
            request.output_token_ids.append(1)
        return [request.request_id for request in last if request.request_id.startswith("p")]


class Churn:
    """A load of `size` requests in which every step one ends, by a stop token, and one arrives."""

    STOP = 7

    def __init__(self, size: int, *, is_caching: bool = True, is_shared: bool = False) -> None:
        config = PDSchedulerConfig(
            mode="hybrid",
            max_prefill_tokens=8192,
            prefill_chunk_size=4096,
            max_prefill_batch_size=size + 1,
            max_decode_batch_size=size + 1,
            enable_prefix_caching=is_caching,
        )
        self.scheduler = PDScheduler(config, kv_budget=KVBudget(num_blocks=100_000, block_size=16))
        self.num_shared = 48 if is_shared else 0
        self.num_arrivals = 0
        self.stops: dict[int, Request] = {}  # by step the request that gets the stop token
        self.step_number = 0
        self.size = size
        for _ in range(size):  # one after another: their blocks fill up in different steps
            self.scheduler.add_request(self._new_request())
            self._step()

    def measure(self, steps: int) -> dict[str, float]:
        """Measure p5, p50 and p99 of a step, and the mean."""
        for _ in range(WARM_UP + self.size):
            self._churn()
        times = [self._churn() for _ in range(steps)]
        return {f"p{p}": _percentile(times, p) for p in (5, 50, 99)} | {"mean": round(sum(times) / steps, 1)}

    def _churn(self) -> float:
        """One arrival and one step; returns their microseconds, without those of this load."""
        request = self._new_request()
        begin = time.perf_counter()
        self.scheduler.add_request(request)
        return 1e6 * (time.perf_counter() - begin) + self._step()

    def _new_request(self) -> Request:
        """A request that ends after `size` steps."""
        self.num_arrivals += 1
        prompt = [5] * self.num_shared + [self.num_arrivals * PROMPT + i for i in range(PROMPT - self.num_shared)]
        request = Request(f"r{self.num_arrivals}", prompt, max_new_tokens=10**6)
        self.stops[self.step_number + self.size] = request
        return request

    def _step(self) -> float:
        """Plan a step, append a token to each request, check each token, and commit."""
        self.step_number += 1
        begin = time.perf_counter()
        out = self.scheduler.schedule()
        planned = time.perf_counter()
        requests = [chunk.request for chunk in out.prefill_batch.chunks if chunk.is_last] if out.prefill_batch else []
        requests += out.decode_batch.requests if out.decode_batch else []
        tokens = [1] * len(requests)
        stopping, stop = self.stops.pop(self.step_number, None), self.STOP
        if stopping is not None:
            tokens[requests.index(stopping)] = stop
        resumed = time.perf_counter()
        finished = []
        for request, token in zip(requests, tokens, strict=True):
            request.output_token_ids.append(token)
            if token == stop:
                finished.append(request.request_id)
        self.scheduler.update_after_step(finished)
        return 1e6 * (planned - begin + time.perf_counter() - resumed)


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 1)


if __name__ == "__main__":
    main()
