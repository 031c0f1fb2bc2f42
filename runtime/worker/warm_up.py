"""Runs every kernel of a GPU once before the first request: no step compiles kernels or captures graphs."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.executor.cuda_graphs import GraphedPlan
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.sequences import NO_DECODES, DecodeBatch, SequenceChunk, WorkerSequence

MAX_SCORED = 65
"""Prompt tokens with logits, in steps of at most so many: kernels of the head are specialised to fewer rows only."""
STAGES: tuple[Stage, ...] = ("decode", "prefill", "hybrid")


MANY_SEQUENCES = 128
"""Kernels of attention are specialised to more sequences, by powers of two."""


class StepLimits(NamedTuple):
    """The sequences of the largest decode step, and the tokens and prompts of the largest step with prompts."""

    max_rows: int = 256
    max_tokens: int = 4096
    max_prompts: int = 32


class _Step(NamedTuple):
    """A step that is not captured: its decodes, and the tokens of its prompts as a whole or in prompts of one token."""

    stage: Stage
    num_decodes: int
    num_tokens: int = 0
    is_split: bool = False


@torch.inference_mode()
def warm_up(runner: ModelRunner, limits: StepLimits, stages: Sequence[Stage] = STAGES) -> None:
    """Captures the decode steps of all buckets, then runs other steps of sizes up to the limits.

    `stages` are those that the runner is for. All sequences consist of padding, so that no block of a request is
    written. Kernels are specialised to sizes by powers of two, hence the steps of these sizes and of one more.
    """
    buckets = runner.buckets
    assert buckets is not None, "only steps on a GPU are warmed up"
    captured = list(buckets.descending()) if "decode" in stages else []
    others = list(_other_steps(limits, stages, max(buckets.rows, default=0)))
    progress = Progress("Warm-up", len(captured) + len(others))
    for rows, width in captured:
        decodes = _decodes(runner, rows, width)
        plan = runner.plan("decode")
        inputs = runner.step_inputs.make(decodes, [], range(rows))
        if isinstance(plan, GraphedPlan):
            plan.capture(inputs)
        else:  # an op without a kernel for the model's sizes
            plan.run(inputs)
        progress.step()
    for step in others:
        _run(runner, step)
        progress.step()
    device = runner.compiler.planner.device
    assert device is not None, "a runner with buckets has a device"
    device.synchronize()
    progress.end()


def _other_steps(limits: StepLimits, stages: Sequence[Stage], max_captured: int) -> Iterator[_Step]:
    """Steps with prompts of few sequences and all numbers of tokens, then of many sequences, and larger decodes."""
    prompts = [stage for stage in stages if stage != "decode"]
    for size in _sizes(limits.max_tokens):
        yield from (_Step(stage, int(stage == "hybrid"), size) for stage in prompts)
    for stage in prompts:
        most = limits.max_prompts + (limits.max_rows if stage == "hybrid" else 0)
        for count in _many(min(most, limits.max_tokens)):
            num_prompts = max(1, count - limits.max_rows) if stage == "hybrid" else count
            yield _Step(stage, count - num_prompts, num_prompts, is_split=True)
    if "decode" in stages:
        yield from (_Step("decode", count) for count in _sizes(limits.max_rows) if count > max_captured)


def _run(runner: ModelRunner, step: _Step) -> None:
    decodes = _decodes(runner, step.num_decodes, width=1) if step.num_decodes else NO_DECODES
    chunks = [_chunk(runner, 1)] * step.num_tokens if step.is_split else _chunks(runner, step.num_tokens)
    num_rows = step.num_decodes + step.num_tokens
    ends = range(step.num_decodes, num_rows) if step.num_tokens <= MAX_SCORED or step.is_split else [num_rows - 1]
    runner.run(step.stage, decodes, chunks, [*range(step.num_decodes), *ends])


def _sizes(most: int) -> list[int]:
    powers = [1 << power for power in range(most.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1) if size <= most} | {most})


def _many(most: int) -> Iterator[int]:
    """Numbers of sequences above MANY_SEQUENCES, one for each power of two."""
    count = MANY_SEQUENCES + 1
    while count <= most:
        yield count
        count = 2 * count - 1


def _decodes(runner: ModelRunner, count: int, width: int) -> DecodeBatch:
    return DecodeBatch([_padding(runner, width * runner.pool.block_size)] * count)


def _chunks(runner: ModelRunner, num_tokens: int) -> list[SequenceChunk]:
    longest = runner.model.max_model_len
    lengths = [longest] * (num_tokens // longest) + [num_tokens % longest] * (num_tokens % longest > 0)
    return [_chunk(runner, length) for length in lengths]


def _chunk(runner: ModelRunner, length: int) -> SequenceChunk:
    return SequenceChunk(_padding(runner, length), 0, length)


def _padding(runner: ModelRunner, num_tokens: int) -> WorkerSequence:
    """A sequence of at most so many tokens, all in the padding block."""
    assert runner.buckets is not None, "only steps on a GPU are padded"
    num_tokens = min(num_tokens, runner.model.max_model_len)
    num_blocks = -(-num_tokens // runner.pool.block_size)
    return WorkerSequence("padding", [0] * num_tokens, block_ids=[runner.buckets.padding_block] * num_blocks)


class Progress:
    """A line on a terminal that counts steps; without a terminal nothing is printed."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._count = title, total, 0
        self._start = time.perf_counter()
        self._is_shown = sys.stderr.isatty()

    def step(self) -> None:
        self._count += 1
        self._show("\r")

    def end(self) -> None:
        self._show("\r")
        if self._is_shown:
            sys.stderr.write("\n")

    def _show(self, start: str) -> None:
        if self._is_shown:
            filled = 30 * self._count // max(self._total, 1)
            bar = "#" * filled + "." * (30 - filled)
            seconds = time.perf_counter() - self._start
            sys.stderr.write(f"{start}{self._title} [{bar}] {self._count}/{self._total} {seconds:.0f} s")
            sys.stderr.flush()
