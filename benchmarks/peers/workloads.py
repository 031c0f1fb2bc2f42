"""The fixed workloads: requests as token ids, and the figure computed from their times."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUM_IDS = 40000
"""Prompts are drawn from the first so many ids, which every shape's vocabulary has."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and the exact number of tokens to generate."""

    prompt: list[int]
    num_new: int


Complete = Callable[[Sequence[Ask]], list[list[int]]]
"""Answers all asks, together if the engine can, and returns the new tokens of each."""


def decode(complete: Complete) -> float:
    """Tokens per second of one sequence: 128 more tokens after a prompt of 128 and a first token."""
    draw = random.Random(1)
    complete([_ask(draw, 128, 16)])
    first = _seconds(complete, [_ask(draw, 128, 1)])
    whole = _seconds(complete, [_ask(draw, 128, 129)])
    return 128 / (whole - first)


def prefill(complete: Complete) -> float:
    """Prompt tokens per second of one prompt of 1024 tokens, until its first new token."""
    draw = random.Random(2)
    complete([_ask(draw, 1024, 1)])
    return 1024 / min(_seconds(complete, [_ask(draw, 1024, 1)]) for _ in range(3))


def serve_16(complete: Complete) -> float:
    """New tokens per second over the whole time of 16 simultaneous requests."""
    return _serve(complete, 16)


def serve_32(complete: Complete) -> float:
    """New tokens per second over the whole time of 32 simultaneous requests."""
    return _serve(complete, 32)


def first_token(complete: Complete) -> float:
    """The time, in seconds of the system's clock, at which a first token after 8 is there."""
    complete([_ask(random.Random(3), 8, 1)])
    return time.time()


WORKLOADS = {"decode": decode, "prefill": prefill, "serve_16": serve_16, "serve_32": serve_32}


def _serve(complete: Complete, num_requests: int) -> float:
    draw = random.Random(num_requests)
    asks = [_ask(draw, draw.randint(32, 512), draw.randint(64, 128)) for _ in range(num_requests)]
    complete([_ask(draw, 64, 8), _ask(draw, 48, 8)])
    return sum(ask.num_new for ask in asks) / _seconds(complete, asks)


def _ask(draw: random.Random, prompt_len: int, num_new: int) -> Ask:
    return Ask([draw.randrange(10, NUM_IDS) for _ in range(prompt_len)], num_new)


def _seconds(complete: Complete, asks: Sequence[Ask]) -> float:
    start = time.perf_counter()
    answers = complete(asks)
    seconds = time.perf_counter() - start
    lengths = [len(answer) for answer in answers]
    assert lengths == [ask.num_new for ask in asks], f"asked for {[ask.num_new for ask in asks]} tokens, got {lengths}"
    return seconds
