"""Streams of the kernel graphs of an engine, by a schedule for one typical step: their sizes are symbolic."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod

import torch

from sageLLM.runtime.core.cost import Hardware, annotate
from sageLLM.runtime.core.ir.dims import Dim, free_symbols
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.base import PassReport
from sageLLM.runtime.core.passes.part_sizes import DIVIDED, sizes_of_part
from sageLLM.runtime.core.passes.schedule import StreamPass
from sageLLM.runtime.execution_graph.batch import DecodeBatch, PrefillBatch, step_sizes
from sageLLM.runtime.execution_graph.stages import GROUP
from sageLLM.runtime.executor.device_hardware import hardware_of
from sageLLM.runtime.executor.model_compiler import Schedule

NUM_DECODES, CONTEXT_LEN, CHUNK_LEN = 16, 512, 512
"""The typical step: so many decodes of this context, and a chunk of a prompt of that length."""
MANY_THREADS = 8


def schedule_streams(
    graph: ExecutionGraph, passes: Iterable[StreamPass], hardware: Hardware, ranks: Mapping[str, int]
) -> list[PassReport]:
    """Assigns streams to the nodes of a kernel graph in place, by their estimated times in a typical step.

    `ranks` are the sizes of groups, such as {"tp": 2}. A graph without collectives and transfers is not changed, nor
    one that only exchanges activations with other pipeline stages: its order, micro-batch by micro-batch, lets the next
    stage begin early, and when messages arrive does not follow from the graph of one stage.
    """
    if not any(map(_can_overlap, graph.nodes.values())):
        return []
    annotate(graph, hardware, {**typical_sizes(graph), **ranks})
    reports = []
    for one in passes:
        one.transform(graph)
        reports.append(one.report)
    return reports


def _can_overlap(node: ExecutionNode) -> bool:
    if node.op_type.is_comm:
        return not (isinstance(node, OpNode) and node.attrs.get("group") == GROUP)
    return node.op_type.name in ("KV_LOAD", "KV_MIGRATE")


def typical_sizes(graph: ExecutionGraph) -> dict[str, Dim]:
    """The sizes of a typical step of the graph's stage; see `specs/dims.yaml`."""
    names = [f"decode-{i}" for i in range(NUM_DECODES)]
    decode = None if graph.stage == "prefill" else DecodeBatch(names, [CONTEXT_LEN] * NUM_DECODES, NUM_DECODES)
    prefill = None if graph.stage == "decode" else PrefillBatch(["chunk"], [CHUNK_LEN], CHUNK_LEN)
    config = graph.model_config
    sizes: dict[str, Dim] = {**step_sizes(prefill, decode)}
    experts, per_token = getattr(config, "X", 0), getattr(config, "A", 0)
    num_tokens = NUM_DECODES * (decode is not None) + CHUNK_LEN * (prefill is not None)
    sizes |= {"P": max(CONTEXT_LEN, CHUNK_LEN), "EX": min(experts, per_token * num_tokens)}
    return sizes | _part_sizes(graph, sizes)


def _part_sizes(graph: ExecutionGraph, sizes: Mapping[str, Dim]) -> dict[str, Dim]:
    """Equal shares of the sizes for each micro-batch of a graph that is split."""
    symbols = {name for ref in graph.inputs.values() for dim in ref.shape for name in free_symbols(dim)}
    parts = [part for part in range(len(symbols)) if not symbols.isdisjoint(map(str, sizes_of_part(part).values()))]
    return {f"{name}{part}": sizes[name] // len(parts) for part in parts for name in DIVIDED}


def choose_schedule(
    device: torch.device, ranks: Mapping[str, int], *, num_processes: int = 1, overlap_transfers: bool | None = None
) -> Schedule | None:
    """The schedule of a rank's graphs, or None for graphs of one stream.

    `num_processes` ranks, of all stages, share the cores of this host. `overlap_transfers` None decides by the machine:
    a CPU needs a core for the thread of the transfers, and on GPUs it is off, since it has not run on one yet.
    """
    if overlap_transfers is None:
        overlap_transfers = device.type == "cpu" and _has_core_for_transfers(max(num_processes, prod(ranks.values())))
    if not overlap_transfers:
        return None
    return partial(schedule_streams, hardware=hardware_of(device), ranks=ranks)


def _has_core_for_transfers(num_ranks: int) -> bool:
    """Whether each rank has a free core, or so many threads that one of their cores more or less matters little."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = torch.get_num_threads()
    return num_threads >= MANY_THREADS or cores >= num_ranks * (num_threads + 1)
