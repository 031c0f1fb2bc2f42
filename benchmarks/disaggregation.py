"""Measures prefill/decode disaggregation: what running decodes notice of prompts, transfers of KV, and recovery.

    python benchmarks/disaggregation.py tail        # time between tokens while 2k-token prompts arrive, by mode
    python benchmarks/disaggregation.py goodput     # requests per second within an objective at rising rates, by mode
    python benchmarks/disaggregation.py bandwidth   # KV from pool to pool, by transport, beside memcpy and a raw socket
    python benchmarks/disaggregation.py streaming   # time to the first and the second token, with and without pieces
    python benchmarks/disaggregation.py recovery    # time until requests go on after a kill of a worker
    python benchmarks/disaggregation.py roles       # time until a prefill worker decodes, and what the others notice
    python benchmarks/disaggregation.py trace --out trace.json   # steps and transfers, for ui.perfetto.dev

Checkpoints have random weights of --shape and are kept in --cache. Each mode is measured in a separate process, with as
many threads as cores: two for one process, one each for a prefill and a decode worker on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from disaggregation_control import WorkApart
from disaggregation_goodput import measure_rates
from disaggregation_transfers import measure_bandwidth
from machine import machine_facts
from peers.shapes import SHAPES, checkpoint

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.runtime.scheduler.transfer import TransferConfig

MODES: dict[str, dict[str, Any]] = {
    "strict, 1+1 workers": {"mode": "strict", "workers": True},
    "strict, 1+1 workers, tcp": {"mode": "strict", "workers": True, "transport": "tcp"},
    "strict, prompts apart": {"mode": "strict", "workers": True, "apart": "prompts"},
    "strict, products apart": {"mode": "strict", "workers": True, "apart": "products"},
    "strict, reads apart": {"mode": "strict", "workers": True, "apart": "reads"},
    "hybrid, chunks of 512": {"mode": "hybrid", "chunk": 512},
    "hybrid, chunks of 128": {"mode": "hybrid", "chunk": 128},
    "time_share": {"mode": "time_share"},
    "auto": {"mode": "auto"},
}
FIGURES: dict[str, Sequence[str]] = {
    "tail": [*MODES],
    "goodput": [name for name in MODES if not any(part in name for part in ("tcp", "apart", "128"))],
    "streaming": ["layers", "pieces", "whole"],
    "recovery": ["prefill", "decode"],
    "roles": ["2+1 workers"],
    "trace": ["strict, 1+1 workers"],
}
"""The figures, each with the names of its rows."""
NUM_DECODES = 4
PROMPT_LEN = 2000
PROMPT_LENS = (256, 1024, 4096)
WINDOW_SECONDS = 0.1
"""`tail --json` has the longest time between two tokens in each window of this length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "bandwidth"])
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="of each phase of `tail`, of each rate of `goodput`"
    )
    parser.add_argument("--interval", type=float, default=6.0, help="seconds between two prompts of `tail`")
    parser.add_argument("--only", default="", help="rows with this regular expression in their names")
    parser.add_argument("--json", type=Path, help="file for the figures of `tail`, of which docs/images draws some")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill step of `streaming`")
    parser.add_argument("--out", type=Path, default=Path("trace.json"), help="file of `trace`")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "sagellm-peers")
    options = parser.parse_args()
    if options.figure == "bandwidth":
        print(measure_bandwidth())
        return
    model = checkpoint(options.shape, options.cache)
    if options.one is not None:
        measure: Callable[[Path, str, argparse.Namespace], dict[str, Any]] = globals()[f"measure_{options.figure}"]
        print(json.dumps(measure(model, options.one, options)))
        return
    machine_load, rows = os.getloadavg()[0], dict[str, Any]()
    for name in FIGURES[options.figure]:
        if re.search(options.only, name):
            found = json.loads(_in_process(name))
            rows[name] = found
            shown = {key: value for key, value in found.items() if key != "windows"}
            print(f"{name:<28} {json.dumps(shown)}", flush=True)
    print(ratios(options.figure, rows))
    if options.json is not None:
        prompts = [index * options.interval for index in range(math.ceil(options.seconds / options.interval))]
        facts = {
            "machine": machine_facts(),
            "load": round(machine_load, 1),
            "prompts_s": prompts,
            "window_s": WINDOW_SECONDS,
        }
        options.json.write_text(json.dumps(facts | {"rows": rows}) + "\n", encoding="utf-8")


def ratios(figure: str, rows: dict[str, dict[str, Any]]) -> str:
    """Ratios within the run, which say more than figures of a busy machine."""
    if figure == "tail" and len(rows) > 1:
        least = min(row["burst_p99_ms"] for row in rows.values())
        return "p99 with prompts, to the least: " + _joined({n: r["burst_p99_ms"] / least for n, r in rows.items()})
    if figure == "streaming" and "whole" in rows:
        return "\n".join(
            f"second token of {length}, to sending at the end: "
            + _joined({name: row[length][1] / rows["whole"][length][1] for name, row in rows.items()})
            for length in rows["whole"]
        )
    if figure == "goodput":
        return "\n".join(
            f"share of {rate} within the objective: "
            + _joined({name: row[rate][1] / row[rate][0] for name, row in rows.items() if row[rate][0]})
            for rate in next(iter(rows.values()), {})
        )
    return ""


def _joined(found: dict[str, float]) -> str:
    return "; ".join(f"{name} {ratio:.2f}" for name, ratio in found.items())


def _in_process(name: str) -> str:
    """The figures of a separate process of this command."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, *sys.argv, "--one", name], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def load(model: Path, mode: str, **options: Any) -> LLM:
    settings = MODES[mode]
    chunk = settings.get("chunk", 512)
    config = PDSchedulerConfig(mode=settings["mode"], prefill_chunk_size=chunk, max_prefill_tokens=2048)
    if settings.get("workers"):
        options |= {"prefill_workers": 1, "decode_workers": 1}
        options["kv_transport"] = settings.get("transport", "shared_memory")
    return LLM(model, skip_tokenizer=True, max_model_len=2048, scheduler=config, **options)


class Clock:
    """Drives an engine, and keeps the times of the tokens of each request."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.engine
        self.times: dict[str, list[float]] = {}
        self.num_tokens: dict[str, int] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.times[name], self.num_tokens[name] = [time.perf_counter()], 0
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.engine.add(name, None, prompt, params)

    def step(self) -> None:
        for output in self.engine.step():
            now, num = time.perf_counter(), len(output.outputs[0].token_ids)
            if num > self.num_tokens[output.request_id]:
                self.num_tokens[output.request_id] = num
                self.times[output.request_id].append(now)

    def gaps(self, names: list[str], start: float, end: float) -> list[float]:
        """Milliseconds between the tokens of these requests that came in a period, ascending."""
        found = []
        for name in names:
            times = self.times[name]
            found += [1e3 * (b - a) for a, b in itertools.pairwise(times[1:]) if start <= b < end]
        return sorted(found)

    def longest(self, names: list[str], start: float, end: float) -> list[tuple[float, float]]:
        """The longest gap that ended in each window of a period with tokens: the window's end and milliseconds."""
        found = dict[int, float]()
        for name in names:
            for a, b in itertools.pairwise(self.times[name][1:]):
                if start <= b < end:
                    window = int((b - start) / WINDOW_SECONDS)
                    found[window] = max(found.get(window, 0.0), 1e3 * (b - a))
        return [(round((one + 1) * WINDOW_SECONDS, 2), round(found[one], 1)) for one in sorted(found)]


def measure_tail(model: Path, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds between tokens of running decodes, quiet and while prompts arrive.

    With work "apart" another process does it, for comparison, and no prompts arrive.
    """
    kind = MODES[mode].get("apart")
    apart = WorkApart(model, PROMPT_LEN, options.interval, kind) if kind else None
    llm = load(model, mode, enable_prefix_caching=False)
    clock, names = Clock(llm), [f"decode {i}" for i in range(NUM_DECODES)]
    for index, name in enumerate(names):
        clock.add(name, [5 + index, *range(7, 22)], 2000)
    clock.add("warm-up", list(range(3, 3 + PROMPT_LEN)), 2)
    while clock.num_tokens["warm-up"] < 2 or clock.num_tokens[names[-1]] < 32:
        clock.step()
    start = time.perf_counter()
    while time.perf_counter() < start + options.seconds:
        clock.step()
    burst, num_prompts = time.perf_counter(), 0
    if apart is not None:
        apart.begin()
    while (now := time.perf_counter()) < burst + options.seconds:
        if apart is None and now >= burst + num_prompts * options.interval:
            clock.add(f"prompt {num_prompts}", [7 + (num_prompts * 31 + i) % 900 for i in range(PROMPT_LEN)], 2)
            num_prompts += 1
        clock.step()
    end = time.perf_counter()
    quiet, busy = clock.gaps(names, start, burst), clock.gaps(names, burst, end)
    firsts = [1e3 * (times[1] - times[0]) for name, times in clock.times.items() if "prompt" in name and times[1:]]
    firsts += apart.end() if apart is not None else []
    llm.close()
    return {
        "quiet_p50_ms": round(_share(quiet, 0.5), 1),
        "quiet_p99_ms": round(_share(quiet, 0.99), 1),
        "burst_p50_ms": round(_share(busy, 0.5), 1),
        "burst_p99_ms": round(_share(busy, 0.99), 1),
        "burst_max_ms": round(busy[-1], 1),
        "burst_p99_over_quiet_p99": round(_share(busy, 0.99) / _share(quiet, 0.99), 2),
        "prompts": len(firsts),
        "ttft_p50_ms": round(_share(sorted(firsts), 0.5)) if firsts else None,
        "windows": clock.longest(names, burst, end),
    }


def measure_goodput(model: Path, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Requests per second within the objective, by the rate of arrivals."""
    llm = load(model, mode, enable_prefix_caching=False)
    found = measure_rates(Clock(llm), options.seconds)
    llm.close()
    return found


def _share(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def with_long_context(model: Path) -> Path:
    """The same checkpoint with room for the longest prompt."""
    folder = Path(tempfile.mkdtemp())
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": max(PROMPT_LENS) + 8}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure_streaming(model: Path, how: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token, and from it to the second, which waits for the transfer; medians of three."""
    transfer = TransferConfig(stream=how != "whole", by_layer=how == "layers")
    config = PDSchedulerConfig(mode="strict", max_prefill_tokens=options.chunk, transfer=transfer)
    llm = LLM(
        with_long_context(model),
        skip_tokenizer=True,
        max_model_len=max(PROMPT_LENS) + 8,
        scheduler=config,
        enable_prefix_caching=False,
        prefill_workers=1,
        decode_workers=1,
    )
    clock, found = Clock(llm), dict[str, Any]()
    for num_tokens in (64, *PROMPT_LENS):
        firsts, seconds = [], []
        for attempt in range(3):
            name = f"{num_tokens} {attempt}"
            clock.add(name, [7 + (attempt * 31 + i) % 900 for i in range(num_tokens)], 3)
            while llm.engine.has_work:
                clock.step()
            start, first, second = clock.times[name][:3]
            firsts.append(1e3 * (first - start))
            seconds.append(1e3 * (second - first))
        if num_tokens in PROMPT_LENS:
            found[f"{num_tokens}"] = [round(sorted(times)[1], 1) for times in (firsts, seconds)]
    llm.close()
    return found


def measure_recovery(model: Path, role: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a kill until each request of the worker has a new token, and the longest gap of the others."""
    llm = load(model, "strict, 1+1 workers")
    clock, names = Clock(llm), [f"decode {i}" for i in range(NUM_DECODES)]
    for index, name in enumerate(names):
        clock.add(name, [5 + index, *range(7, 260)], 600)
    while min(clock.num_tokens.values()) < 16:
        clock.step()
    if role == "prefill":  # a request that is being prefilled
        clock.add("new", list(range(3, 1003)), 4)
        names = ["new"]
    clock.step()
    executor = llm.engine.executor.executors[role == "decode"]
    killed, before = time.perf_counter(), dict(clock.num_tokens)
    os.kill(executor.process_ids[0], signal.SIGKILL)
    while any(clock.num_tokens[name] <= before[name] + (name != "new") for name in names):
        clock.step()
    recovered = time.perf_counter()
    others = [f"decode {i}" for i in range(NUM_DECODES)] if role == "prefill" else []
    gaps = clock.gaps(others, killed, recovered)
    llm.close()
    return {
        "recovered_s": round(recovered - killed, 2),
        "longest_gap_of_decodes_ms": round(gaps[-1], 1) if gaps else None,
    }


def measure_roles(model: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A prefill worker becomes a decode worker, and one of prefill again, while requests arrive all the time."""
    config = PDSchedulerConfig(mode="strict", max_prefill_tokens=2048)
    limits: dict[str, Any] = {"skip_tokenizer": True, "max_model_len": 2048}
    llm = LLM(model, scheduler=config, prefill_workers=2, decode_workers=1, **limits)
    clock, engine = Clock(llm), llm.engine
    names = [f"decode {i}" for i in range(NUM_DECODES)]
    for index, one in enumerate(names):
        clock.add(one, [5 + index, *range(7, 22)], 600)
    while min(clock.num_tokens.values()) < 16:
        clock.step()
    for index in range(4):  # both prefill workers have some when one is asked to change
        clock.add(f"first {index}", list(range(3 + index, 1003 + index)), 8)
    clock.step()
    switched: list[float] = []
    num_added = 0
    for role in ("decode", "prefill"):
        engine.set_role(1, role)
        asked = time.perf_counter()
        while engine.workers()[1].role != role:
            if num_added < 400 and time.perf_counter() > asked + num_added % 20 * 0.5:
                clock.add(f"prompt {num_added}", [7 + (num_added * 31 + i) % 900 for i in range(200)], 8)
                num_added += 1
            clock.step()
        switched.append(time.perf_counter() - asked)
    end = time.perf_counter()
    while engine.has_work:
        clock.step()
    gaps = clock.gaps(names, 0.0, end)
    lost = sum(num < 8 for num in clock.num_tokens.values())
    llm.close()
    return {
        "to_decode_s": round(switched[0], 2),
        "to_prefill_s": round(switched[1], 2),
        "requests": len(clock.times),
        "lost": lost,
        "longest_gap_of_decodes_ms": round(gaps[-1], 1),
    }


def measure_trace(model: Path, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Writes a trace of decodes during which two prompts arrive."""
    llm = load(model, mode)
    clock, timeline = Clock(llm), llm.engine.record_timeline()
    for index in range(NUM_DECODES):
        clock.add(f"decode {index}", [5 + index, *range(7, 22)], 64)
    for index in range(2):
        clock.add(f"prompt {index}", list(range(3 + index, 1003 + index)), 8)
    while llm.engine.has_work:
        clock.step()
    options.out.write_text(timeline.to_json([worker.role for worker in llm.engine.workers()]))
    llm.close()
    return {"steps": len(timeline.steps), "transfers": len(timeline.transfers), "file": str(options.out)}


if __name__ == "__main__":
    main()
