"""Memory of a GPU for the KV cache: a fraction of all its memory, less what other data and the largest step take."""

from dataclasses import dataclass

import torch

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.passes.memory import plan_memory
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor.buckets import row_buckets, table_widths
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.kernels.triton import workspace_bytes
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

TEMPORARY_FACTOR = 2
"""Memory of a step relative to a tight plan of its values: torch rounds sizes up, and launchers have temporaries."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a GPU: all, and those that no process uses."""

    total: int
    free: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU now; None for a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free)


def check_utilization(value: float) -> None:
    """Raises SageError unless `gpu_memory_utilization` is a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise SageError(f"gpu_memory_utilization must be above 0 and at most 1, got {shown(value)}")


def kv_cache_bytes(memory: DeviceMemory, utilization: float, reserved: int) -> int:
    """The bytes for the KV cache, as in vLLM: what is in use, and `reserved`, count towards the fraction.

    Raises SageError if nothing remains.
    """
    used = memory.total - memory.free
    found = int(memory.total * utilization) - used - reserved
    if found <= 0:
        gib = [f"{count / 2**30:.1f}" for count in (memory.total, used, reserved)]
        raise SageError(
            f"gpu_memory_utilization={utilization} of {gib[0]} GiB must leave memory for KV, got {gib[1]} GiB "
            f"in use and {gib[2]} GiB for a step; raise it, or lower max_num_batched_tokens or max_num_seqs"
        )
    return found


def step_bytes(model: Model, compiler: ModelCompiler, config: PDSchedulerConfig, block_size: int) -> int:
    """An estimate of the memory of the largest step and of all captured graphs.

    The results of parts of sequences in decode attention are no values of a graph, and can be larger than all of them.
    """
    decodes, prompt_tokens = config.max_decode_batch_size, config.max_prefill_tokens
    rows = decodes + min(prompt_tokens, config.max_prefill_batch_size)
    max_blocks = -(-model.max_model_len // block_size)
    sizes = {"T": decodes + prompt_tokens, "Td": decodes, "Tp": prompt_tokens, "B": rows, "S": rows, "MB": max_blocks}
    sizes |= {"PG": 1, "BS": block_size, "P": model.max_model_len}
    graph, buckets = compiler.kernel_graph("hybrid"), row_buckets(decodes)
    uses_triton = compiler.planner.name == "triton"
    largest = TEMPORARY_FACTOR * plan_memory(graph, sizes).peak_bytes
    largest += workspace_bytes(graph, sizes) if uses_triton else 0
    if not compiler.planner.captures:
        return largest
    # Captured graphs share memory with each other, not with other steps.
    own = workspace_bytes(compiler.kernel_graph("decode"), {**sizes, "B": buckets[-1]}) if uses_triton else 0
    return largest + own + sum(buckets) * len(table_widths(max_blocks)) * 4 * int(model.config.V)


def unloaded_bytes(model: Model) -> int:
    """The bytes of the weights of one rank, for an engine that has none itself."""
    specs = [spec for spec in model.layout.weights(model.config) if spec.tied_to is None]
    num_bytes = sum(torch.Size(spec.shape).numel() for spec in specs) * model.dtype.itemsize
    return -(-num_bytes // model.pipeline_stage.count)
