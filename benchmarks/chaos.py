"""Kills prefill and decode workers at random, and compares every answer with that of an undisturbed run.

    python benchmarks/chaos.py                                   # 800 requests and 200 kills, on the bundled tiny model
    python benchmarks/chaos.py --requests 80 --kills 8 --prefill-workers 2 --decode-workers 2 --transport tcp
    python benchmarks/chaos.py --requests 100 --kills 20 --throttle 4mbit   # over a slow link; as root
    python benchmarks/chaos.py --simulated 1000000               # transfers with loss, duplication and reordering
    python benchmarks/chaos.py --frames 100000                   # malformed frames to a rank's port

Real workers are killed by SIGKILL, or with --stop by SIGSTOP, which the engine notices by the deadline of a step.
With --throttle the engine runs in a network namespace, whose loopback interface has this rate (tc's tbf), and copies KV
over TCP. Simulated workers run the real schedulers and state machines under virtual time. The exit code is 1 if a
request is lost, a token emitted twice, or a text differs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "tiny_python_model"
BATCH = 16
STEP_SECONDS = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--prefill-workers", type=int, default=2)
    parser.add_argument("--decode-workers", type=int, default=2)
    parser.add_argument("--transport", choices=["shared_memory", "tcp"], default="shared_memory")
    parser.add_argument("--by-layer", action="store_true", help="copy the layers of a chunk while it is computed")
    parser.add_argument("--throttle", metavar="RATE", help="rate of the link, in a network namespace, such as 4mbit")
    parser.add_argument("--stop", action="store_true", help="stop workers instead of killing them")
    parser.add_argument("--simulated", type=int, metavar="TRANSFERS")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.simulated is not None:
        sys.exit(simulate(options.simulated, options.seed))
    if options.frames is not None:
        sys.exit(send_frames(options.frames, options.seed))
    if options.throttle is not None:
        sys.exit(run_throttled(options.throttle))
    sys.exit(kill_workers(options))


def run_throttled(rate: str) -> int:
    """Runs this command again in a network namespace with a slow loopback interface."""
    # With packets as large as the burst tbf would drop each full one, and the link would be broken in place of slow.
    limit = f"tbf rate {shlex.quote(rate)} burst 64kb latency 2s"
    link = f"ip link set lo mtu 1500 up && tc qdisc add dev lo root {limit}"
    at = sys.argv.index("--throttle")
    command = [sys.executable, *sys.argv[:at], *sys.argv[at + 2 :], "--transport", "tcp"]
    return subprocess.run(
        ["unshare", "--net", "sh", "-c", f"{link} && exec {shlex.join(command)}"], check=False
    ).returncode


def kill_workers(options: argparse.Namespace) -> int:
    """Streams the requests, with kills at random tokens; returns 1 after a wrong answer."""
    from sageLLM import LLM, PDSchedulerConfig, SamplingParams
    from sageLLM.runtime.scheduler.transfer import TransferConfig

    draw = random.Random(options.seed)
    prompts = [[draw.randrange(3, 400) for _ in range(draw.randrange(1, 120))] for _ in range(options.requests)]
    params = [
        SamplingParams(max_tokens=draw.randrange(8, 64), temperature=draw.choice([0.0, 1.0]), seed=index)
        for index in range(options.requests)
    ]
    transfer = TransferConfig(by_layer=options.by_layer)
    config = PDSchedulerConfig(mode="strict", max_prefill_tokens=64, max_decode_batch_size=BATCH, transfer=transfer)
    arguments: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "scheduler": config}
    expected = [(o.outputs[0].token_ids, o.outputs[0].text) for o in LLM(MODEL, **arguments).generate(prompts, params)]
    llm = LLM(
        MODEL,
        **arguments,
        prefill_workers=options.prefill_workers,
        decode_workers=options.decode_workers,
        kv_transport=options.transport,
    )
    executors = llm.engine.executor.executors
    for executor in executors:
        executor.step_seconds = STEP_SECONDS
    num_tokens = sum(len(ids) for ids, _ in expected)
    due = sorted(draw.sample(range(num_tokens), min(options.kills, num_tokens)))
    started, seen, kills = time.monotonic(), 0, 0
    doubled, answers = 0, dict[int, Any]()
    for first in range(0, options.requests, 8 * BATCH):
        part = range(first, min(first + 8 * BATCH, options.requests))
        last: dict[str, int] = {}
        for output in llm.stream([prompts[i] for i in part], [params[i] for i in part]):
            num = len(output.outputs[0].token_ids)
            doubled += num <= last.get(output.request_id, 0) and not output.finished
            seen += num - last.get(output.request_id, 0)
            last[output.request_id] = num
            if output.finished:
                answers[int(output.request_id)] = output.outputs[0]
            while due and seen > due[0]:
                if not _kill(draw.choice(executors), stop=options.stop):
                    break  # with the next token
                due.pop(0)
                kills += 1
    found = [answers.get(index) for index in range(options.requests)]
    lost = sum(one is None or one.finish_reason == "abort" for one in found)
    pairs = zip(found, expected, strict=True)
    differ = sum(one is not None and (one.token_ids, one.text) != wanted for one, wanted in pairs)
    llm.engine.group.check_integrity()
    used = llm.engine.scheduler_stats()["kv_blocks_used"]
    epochs = [status.epoch for status in llm.engine.workers()]
    llm.close()
    print(
        f"{options.requests} requests, {kills} kills of {len(executors)} workers (epochs {epochs}), "
        f"{time.monotonic() - started:.0f} s: {lost} lost, {doubled} duplicated, {differ} differ, {used} blocks in use"
    )
    return int(bool(lost or doubled or differ or used))


def _kill(executor: Any, *, stop: bool) -> bool:
    """Kills a worker; false if it is just being started again."""
    if executor.lost is not None or not executor.process_ids:
        return False
    try:
        os.kill(executor.process_ids[0], signal.SIGSTOP if stop else signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def simulate(num_transfers: int, seed: int) -> int:
    """Plays worlds with faulty links and dying workers until so many pieces were sent."""
    sys.path.insert(0, str(ROOT / "tests" / "scheduler"))
    world_of = importlib.import_module("disaggregated_world")
    world_of.CHECK_EVERY = 500
    sent = requests = worlds = ended = 0
    started = time.monotonic()
    while sent < num_transfers:
        draw = random.Random(seed + worlds)
        faults = world_of.Faults(
            lose=draw.uniform(0, 0.3),
            duplicate=draw.uniform(0, 0.5),
            reorder=draw.uniform(0, 0.5),
            corrupt=draw.uniform(0, 0.05),
            slow=draw.choice([1.0, 1.0, 10.0]),
        )
        roles = draw.choice(["PD", "PPD", "PDD", "PPDD"])
        transport = draw.choice(["memory", "tcp"])
        # Short chunks and answers: most of the time goes to transfers.
        options = {"seed": seed + worlds, "transport": transport, "faults": faults, "chunk": 8, "num_blocks": 100}
        world = world_of.World(roles, prefix_caching=False, **options)
        for _ in range(60):
            world.add([draw.randrange(50) for _ in range(draw.randrange(1, 150))], draw.randrange(1, 4))
            for _ in range(draw.randrange(30)):
                world.step()
            if draw.random() < 0.05:
                world.kill(draw.randrange(len(roles)))
        world.run(6000.0)
        for request in world.requests.values():
            wanted = world_of.answer_to(request.prompt_token_ids, request.max_new_tokens)
            found = world.emitted[request.request_id]
            is_ended = request.request_id in world.reasons
            if found != (wanted[: len(found)] if is_ended else wanted):
                print(f"seed {seed + worlds}: the answer of {request.request_id} differs")
                return 1
            ended += is_ended
        if any(scheduler.kv.decode.pool.num_used for scheduler in world.schedulers):
            print(f"seed {seed + worlds}: blocks are left")
            return 1
        sent += world.group.get_stats()["total_pieces"]
        requests += len(world.requests)
        worlds += 1
    print(
        f"{sent} transfers of {requests} requests in {worlds} worlds, {time.monotonic() - started:.0f} s: 0 lost, "
        f"0 duplicated, 0 differ; {ended} ended with a reason"
    )
    return 0


def send_frames(num_frames: int, seed: int) -> int:
    """Sends malformed frames to the port of a rank, half of them from a process with the key."""
    sys.path.insert(0, str(ROOT / "tests" / "transport"))
    tests = importlib.import_module("test_transports")
    started = time.monotonic()
    tests.test_malformed_frames_close_their_connection_alone(num_frames)
    print(f"{num_frames} malformed frames, {time.monotonic() - started:.0f} s: nothing was written, transfers go on")
    return 0


if __name__ == "__main__":
    main()
