"""Starts the workers of attention-FFN disaggregation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.attention_ffn import Side
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.worker.af_link import MAX_PARTS
from sageLLM.runtime.worker.build import WorkerSpec
from sageLLM.runtime.worker.executor import Executor
from sageLLM.runtime.worker.ffn_workers import FfnWorkers
from sageLLM.runtime.worker.process_executor import ProcessExecutor


def start_disaggregated(
    spec: WorkerSpec, num_attention: int, num_ffn: int, width: int, model: Model, config: PDSchedulerConfig
) -> tuple[FfnWorkers, list[Executor]]:
    """The FFN workers, and an executor for each attention worker. Raises what `ProcessExecutor` raises.

    There are `num_ffn` groups of `width` FFN workers, and at least so many micro-batches that every group gets some.
    """
    spec = msgspec.structs.replace(
        spec,
        num_workers=num_attention + num_ffn * width,
        num_ffn=num_ffn,
        num_ubatches=max(spec.num_ubatches, -(-num_ffn // num_attention)),
    )
    if -(-spec.num_ubatches // num_ffn) > MAX_PARTS:
        raise SageError(
            f"num_ubatches must be at most {MAX_PARTS * num_ffn} with {num_ffn} FFN workers, got {spec.num_ubatches}"
        )
    num_peers = num_ffn * width
    ffn_sides = [Side("ffn", rank, num_attention, width) for rank in range(num_peers)]
    ffn_workers = FfnWorkers(spec, ffn_sides, _ring_bytes(model, config))
    with ThreadPoolExecutor(num_attention) as starters:  # they load at the same time
        sides = [Side("attention", rank, num_peers, width) for rank in range(num_attention)]
        starting = [starters.submit(_start_attention, spec, side, ffn_workers) for side in sides]
    try:
        return ffn_workers, [one.result() for one in starting]
    except BaseException:
        for one in starting:
            if one.exception() is None:
                one.result().close()
        ffn_workers.close()
        raise


def _start_attention(spec: WorkerSpec, side: Side, ffn_workers: FfnWorkers) -> Executor:
    spec = msgspec.structs.replace(spec, side=side)
    return ProcessExecutor(spec, open_channel=partial(ffn_workers.join, side.rank))


def _ring_bytes(model: Model, config: PDSchedulerConfig) -> int:
    """Room for all rows of a step, so that neither side waits for the other one to take its micro-batches.

    Pages that are never used are never allocated.
    """
    num_tokens = max(config.max_prefill_tokens, model.max_model_len) + config.max_decode_batch_size
    num_bytes: int = 2 * num_tokens * model.config.H * model.dtype.itemsize
    return max(num_bytes, 2**16)
