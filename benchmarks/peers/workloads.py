"""The fixed workloads: requests of token ids, and the figures computed from their times, several per process."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from load import LoadTimes

NUM_IDS = 4000
"""Prompts are drawn from the first so many ids, which every shape's vocabulary has."""
NUM_DECODED = 64
"""New tokens of a decode after a short prompt; see `num_decoded`."""
PROMPT_LENS, OUTPUT_LENS = (32, 256), (32, 64)
"""Ranges of the lengths of simultaneous requests."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and the exact number of tokens to generate."""

    prompt: list[int]
    num_new: int


Complete = Callable[[Sequence[Ask]], list[list[int]]]
"""Answers all asks, together if the engine can, and returns the new tokens of each."""


class Sample(NamedTuple):
    """A figure in tokens per second, and the cores that other processes used meanwhile."""

    value: float
    foreign: float


@dataclass(frozen=True, slots=True)
class Workload:
    """A way to measure, and how often in each process.

    A prompt of `warm_up` tokens comes first, so that an engine makes a context of that size before the clock starts.
    """

    measure: Callable[[Complete, random.Random], float]
    num_samples: int
    num_requests: int = 1
    warm_up: int = 24

    def samples(self, complete: Complete, seed: int, until: float) -> list[Sample]:
        """The figures of this process; after the time `until` (of `time.perf_counter`) only one is measured."""
        draw = random.Random(seed)
        complete([ask(draw, self.warm_up, 4) for _ in range(self.num_requests)])
        found: list[Sample] = []
        while len(found) < self.num_samples and (not found or time.perf_counter() < until):
            start = LoadTimes.now()
            value = self.measure(complete, draw)
            found.append(Sample(value, LoadTimes.now().foreign_since(start)))
        return found


def num_decoded(context: int) -> int:
    """New tokens that a decode is timed for: more after a long prompt, whose own time is subtracted with its noise."""
    return max(NUM_DECODED, context // 16)


def decode(context: int) -> Callable[[Complete, random.Random], float]:
    """Tokens per second of one sequence: `num_decoded` more tokens after a prompt of `context` and a first token."""
    num = num_decoded(context)

    def measure(complete: Complete, draw: random.Random) -> float:
        first = seconds(complete, [ask(draw, context, 1)])
        whole = seconds(complete, [ask(draw, context, num + 1)])
        return num / (whole - first)

    return measure


def prefill(length: int) -> Callable[[Complete, random.Random], float]:
    """Prompt tokens per second of one prompt, until its first new token."""
    return lambda complete, draw: length / seconds(complete, [ask(draw, length, 1)])


def serve(num_requests: int) -> Callable[[Complete, random.Random], float]:
    """New tokens per second over the whole time of simultaneous requests, the same ones for every engine."""
    return lambda complete, _: throughput(complete, requests(num_requests))


def throughput(complete: Complete, asks: Sequence[Ask]) -> float:
    return sum(one.num_new for one in asks) / seconds(complete, asks)


def requests(num: int) -> list[Ask]:
    """The requests of `serve`."""
    draw = random.Random(num)
    return [ask(draw, draw.randint(*PROMPT_LENS), draw.randint(*OUTPUT_LENS)) for _ in range(num)]


def first_token(complete: Complete) -> float:
    """The time, in seconds of the system's clock, at which a first token after 8 is there."""
    complete([ask(random.Random(3), 8, 1)])
    return time.time()


WORKLOADS = {
    "decode": Workload(decode(128), 4),
    "prefill_256": Workload(prefill(256), 3),
    "prefill_1024": Workload(prefill(1024), 3),
    "serve_16": Workload(serve(16), 2, 16),
    "serve_32": Workload(serve(32), 2, 32),
    "decode_2048": Workload(decode(2048), 3, warm_up=2048),
    "decode_8192": Workload(decode(8192), 2, warm_up=8192),
    "prefill_4096": Workload(prefill(4096), 2, warm_up=4096),
    "serve_64": Workload(serve(64), 1, 64),
}
STANDARD = ("decode", "prefill_256", "prefill_1024", "serve_16", "serve_32")
"""The workloads of a round unless `--workloads` names others; all of them would take an hour."""


def ask(draw: random.Random, prompt_len: int, num_new: int) -> Ask:
    return Ask([draw.randrange(10, NUM_IDS) for _ in range(prompt_len)], num_new)


def seconds(complete: Complete, asks: Sequence[Ask]) -> float:
    """The time of all answers. Raises AssertionError unless each has the number of tokens that it was asked for."""
    start = time.perf_counter()
    answers = complete(asks)
    elapsed = time.perf_counter() - start
    lengths, wanted = [len(answer) for answer in answers], [one.num_new for one in asks]
    assert lengths == wanted, f"expected {wanted} tokens, got {lengths}"
    return elapsed
