"""Compares mode `auto` with the fixed modes by SLO attainment.

    python benchmarks/auto.py [--num-requests N] [--seeds 0,1] [--only TEXT]
    python benchmarks/auto.py --random 100 [--first 0] [--num-requests 300]
    python benchmarks/auto.py --moved 8 [--seeds 0,1] [--only TEXT]

The second form plays random loads, from light ones to overload, and prints the distribution of the largest regret.
The third plays each load several times, with arrivals moved at random by up to a millisecond, to show what is chance:
the largest regret of the means over these times, and how far the best fixed mode is from itself.
Traffic has the length distributions of Azure's traces of 2023 (median and 90th percentile) and Poisson arrivals; the
step times are the roofline of Llama-3.1-8B on H100s. `regret` is the best fixed mode minus `auto` in points, negative
where `auto` is better than every fixed mode: over the whole run, and the largest one over its first n requests, for all
n from 100 on. Simulated, so the same command prints the same figures.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from sageLLM.generated.builders import MODELS
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.sim.metrics import Slo
from sageLLM.runtime.sim.modes import Setup, SimMode, make_cluster
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import Lengths, TraceRequest, synthetic

NUM_FIRST = 100
MOVED_BY_S = 0.001
"""The most by which `--moved` delays an arrival."""
LIMIT = 2.0
"""Points of regret that mode `auto` should not exceed."""
LLAMA_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
TRAFFIC = {
    "code": (Lengths(1469, 5187, 7437), Lengths(13, 55, 400)),
    "conversation": (Lengths(1020, 2734, 8000), Lengths(129, 424, 1000)),
}
MODES: dict[str, tuple[SimMode, dict[str, int]]] = {
    "prefill first": ("time_share", {"max_consecutive_decodes": 0}),
    "time_share": ("time_share", {}),
    "hybrid": ("hybrid", {}),
    "hybrid 2048": ("hybrid", {"prefill_chunk_size": 2048}),
    "auto": ("auto", {}),
}


@dataclass(frozen=True)
class Load:
    """Traffic at a rate per second on a number of devices, with its objective."""

    traffic: str
    rate: float
    slo: Slo
    num_devices: int = 1

    def __str__(self) -> str:
        slo = f"{self.slo.ttft_s:g}, {self.slo.tpot_s:g}"
        return f"{self.traffic} | {self.rate:g} | {self.num_devices} | {slo}"


LOADS = (
    Load("code", 40, Slo(0.5, 0.03), 3),
    Load("code", 40, Slo(0.3, 0.05), 3),
    Load("code", 40, Slo(0.5, 0.03), 2),
    Load("code", 12, Slo(0.5, 0.03)),
    Load("conversation", 18, Slo(0.5, 0.02)),
    Load("conversation", 18, Slo(0.3, 0.03)),
    Load("conversation", 12, Slo(0.2, 0.02)),
)
RATES = {"code": (8.0, 18.0), "conversation": (10.0, 26.0)}
"""The range of the random loads in requests per second and device."""
Good = list[bool]
"""For each request whether it met the objective."""


@cache
def cost() -> RooflineStepCost:
    layout = MODELS["llama"]
    return RooflineStepCost(layout, layout.read_config(HFConfig(LLAMA_8B)), HARDWARE["h100"])


def requests_of(load: Load, num_requests: int, seed: int) -> list[TraceRequest]:
    """The requests of a load."""
    return synthetic(num_requests, load.rate, *TRAFFIC[load.traffic], seed=seed)


def moved(trace: Sequence[TraceRequest], number: int) -> list[TraceRequest]:
    """The same requests, each up to `MOVED_BY_S` later, in the same order; unchanged for number 0."""
    draw = random.Random(number)
    times = sorted(one.arrival_s + (draw.uniform(0, MOVED_BY_S) if number else 0.0) for one in trace)
    return [replace(one, arrival_s=arrival_s) for one, arrival_s in zip(trace, times, strict=True)]


def play(mode: str, load: Load, num_requests: int, seed: int) -> Good:
    """Serve the load in this mode."""
    return serve(mode, load, requests_of(load, num_requests, seed))


def serve(mode: str, load: Load, trace: Sequence[TraceRequest]) -> Good:
    """Serve these requests in this mode, with the devices and the objective of the load."""
    name, limits = MODES[mode]
    setup = Setup(
        cost(),
        lambda tokens: 0.0,
        KVBudget(cost().num_kv_blocks(16)),
        num_prefill=load.num_devices,
        num_decode=0,
        scheduler=PDSchedulerConfig(max_prefill_batch_size=256, max_decode_batch_size=256, **limits),
        enable_prefix_caching=False,
        objective=ServiceObjective(load.slo.ttft_s, load.slo.tpot_s),
    )
    return [load.slo.is_met(timeline) for timeline in Simulation(make_cluster(name, setup)).run(trace)]


def attainment(good: Good) -> float:
    """SLO attainment in %."""
    return 100 * sum(good) / len(good)


def regret(found: dict[str, Good], num: int | None = None) -> float:
    """The best fixed mode minus `auto` in points, over the first `num` requests."""
    by_mode = {mode: attainment(good[:num]) for mode, good in found.items()}
    return max(value for mode, value in by_mode.items() if mode != "auto") - by_mode["auto"]


def largest_regret(found: dict[str, Good]) -> float:
    """The largest regret over the first n requests, for n from NUM_FIRST on."""
    return max(regret(found, num) for num in range(NUM_FIRST, len(found["auto"]) + 1))


def means(played: Sequence[Good]) -> list[float]:
    """The mean number that met the objective of the first n requests, for n from NUM_FIRST on."""
    return [sum(counts) / len(played) for counts in zip(*map(from_first, played), strict=True)]


def from_first(good: Good) -> list[int]:
    """The number that met the objective of the first n requests, for n from NUM_FIRST on."""
    return list(accumulate(good))[NUM_FIRST - 1 :]


def largest_gap(better: Sequence[float], worse: Sequence[float]) -> float:
    """The largest difference in points over the first n requests, from counts of `from_first` or `means`."""
    return max(100 * (a - b) / n for n, (a, b) in enumerate(zip(better, worse, strict=True), NUM_FIRST))


@dataclass(frozen=True)
class Chance:
    """Effect of moved arrivals in points, each the largest over the first n requests."""

    regret: float
    """Of the means."""
    num_above: int
    """Times of which the regret is above LIMIT."""
    num_times: int
    of_itself: float
    """The best fixed mode with unmoved arrivals minus itself with moved ones, or the reverse, whichever is most."""

    def __str__(self) -> str:
        times = f"{self.num_above} of {self.num_times}"
        return f"{self.regret:.1f} | {times} | {self.of_itself:.1f}"


def chance(load: Load, num_requests: int, seed: int, num_times: int) -> Chance:
    """Play the load `num_times` times with moved arrivals."""
    traces = [moved(requests_of(load, num_requests, seed), number) for number in range(num_times)]
    played = {mode: [serve(mode, load, trace) for trace in traces] for mode in MODES}
    fixed = [mode for mode in MODES if mode != "auto"]
    auto = means(played["auto"])
    counts = [from_first(good) for good in played[max(fixed, key=lambda mode: means(played[mode])[-1])]]
    regrets = [largest_regret({mode: played[mode][number] for mode in MODES}) for number in range(num_times)]
    return Chance(
        max(largest_gap(means(played[mode]), auto) for mode in fixed),
        sum(one > LIMIT for one in regrets),
        num_times,
        max(max(largest_gap(counts[0], one), largest_gap(one, counts[0])) for one in counts[1:]),
    )


def random_load(number: int) -> tuple[Load, int]:
    """A load and a seed for its requests, determined by the number."""
    draw = random.Random(number)
    traffic = draw.choice(["code", "conversation"])
    num_devices = draw.choice([1, 1, 2, 3])
    rate = round(num_devices * draw.uniform(*RATES[traffic]), 1)
    slo = Slo(draw.choice([0.2, 0.3, 0.5, 1.0]), draw.choice([0.015, 0.02, 0.03, 0.05]))
    return Load(traffic, rate, slo, num_devices), draw.randrange(1000)


def loads(args: argparse.Namespace) -> Iterator[tuple[Load, int]]:
    """The loads and seeds that the arguments select."""
    if args.random:
        yield from map(random_load, range(args.first, args.first + args.random))
        return
    for load in LOADS:
        yield from ((load, seed) for seed in map(int, args.seeds.split(",")) if args.only in str(load))


def distribution(largest: list[float]) -> str:
    """The largest regrets of several loads in one line."""
    ordered = sorted(largest)
    above = sum(one > LIMIT for one in ordered)
    p99 = ordered[-(len(ordered) // 100) - 1]
    return (
        f"{len(ordered)} loads: largest regret {ordered[-1]:.1f}, 99th percentile {p99:.1f}, above {LIMIT:g} points "
        f"in {above} ({100 * above / len(ordered):.1f} %)"
    )


def print_chance(args: argparse.Namespace) -> None:
    """Print what moved arrivals change."""
    print("| traffic | rate | devices | TTFT, TPOT s | regret of the means | above | fixed mode of itself | seed |")
    print("|---" * 8 + "|")
    for load, seed in loads(args):
        print(f"| {load} | {chance(load, args.num_requests, seed, args.moved)} | {seed} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=500)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="loads with this text, such as 'code | 40'")
    parser.add_argument("--random", type=int, default=0, help="number of random loads instead of the fixed ones")
    parser.add_argument("--first", type=int, default=0, help="number of the first random load")
    parser.add_argument("--moved", type=int, default=0, help="times to play each load with moved arrivals, 2 at least")
    args = parser.parse_args()
    if args.moved:
        print_chance(args)
        return
    print("| traffic | rate | devices | TTFT, TPOT s |", " | ".join(MODES), "| regret | largest | seed |")
    print("|---" * (len(MODES) + 7) + "|")
    found_largest: list[float] = []
    for load, seed in loads(args):
        found = {mode: play(mode, load, args.num_requests, seed) for mode in MODES}
        found_largest.append(largest_regret(found))
        cells = [f"{value:.1f}" for value in (*map(attainment, found.values()), regret(found), found_largest[-1])]
        print(f"| {load} |", " | ".join(cells), f"| {seed} |", flush=True)
    if args.random:
        print(distribution(found_largest))


if __name__ == "__main__":
    main()
