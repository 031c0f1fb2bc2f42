"""Runs every kernel of a GPU once before the first request: no step compiles kernels or captures graphs."""

import sys
import time
from collections.abc import Sequence

import torch

from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.executor.cuda_graphs import GraphedPlan
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.sequences import NO_DECODES, DecodeBatch, SequenceChunk, WorkerSequence

MAX_SCORED = 65
"""Prompt tokens with logits, in steps of at most so many: kernels of the head are specialised to fewer rows only."""
STAGES: tuple[Stage, ...] = ("decode", "prefill", "hybrid")


@torch.inference_mode()
def warm_up(runner: ModelRunner, max_tokens: int, stages: Sequence[Stage] = STAGES) -> None:
    """Captures the decode steps of all buckets, then runs prefill and hybrid steps of up to `max_tokens` tokens.

    `stages` are those that the runner is for. All sequences consist of padding, so that no block of a request is
    written. Kernels are specialised to sizes by powers of two, hence the steps of these sizes and of one token more.
    """
    buckets = runner.buckets
    assert buckets is not None, "only steps on a GPU are warmed up"
    captured = list(buckets.descending()) if "decode" in stages else []
    others = [stage for stage in stages if stage != "decode"]
    eager = [(stage, size) for size in _sizes(max_tokens) for stage in others]
    progress = Progress("Warm-up", len(captured) + len(eager))
    for rows, width in captured:
        decodes = DecodeBatch([_padding(runner, width * runner.pool.block_size)] * rows)
        plan = runner.plan("decode")
        inputs = runner.step_inputs.make(decodes, [], range(rows))
        if isinstance(plan, GraphedPlan):
            plan.capture(inputs)
        else:  # an op without a kernel for the model's sizes
            plan.run(inputs)
        progress.step()
    one = DecodeBatch([_padding(runner, runner.pool.block_size)])
    for stage, num_tokens in eager:
        decodes = one if stage == "hybrid" else NO_DECODES
        num_rows = len(decodes) + num_tokens
        scored = range(len(decodes), num_rows) if num_tokens <= MAX_SCORED else [num_rows - 1]
        runner.run(stage, decodes, _chunks(runner, num_tokens), [*range(len(decodes)), *scored])
        progress.step()
    device = runner.compiler.planner.device
    assert device is not None, "a runner with buckets has a device"
    device.synchronize()
    progress.end()


def _sizes(max_tokens: int) -> list[int]:
    powers = [1 << power for power in range(max_tokens.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1) if size <= max_tokens} | {max_tokens})


def _chunks(runner: ModelRunner, num_tokens: int) -> list[SequenceChunk]:
    longest = runner.model.max_model_len
    lengths = [longest] * (num_tokens // longest) + [num_tokens % longest] * (num_tokens % longest > 0)
    return [SequenceChunk(_padding(runner, length), 0, length) for length in lengths]


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
