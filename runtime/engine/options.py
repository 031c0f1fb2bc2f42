"""The arguments of `LLM`, as one record: names, types, defaults, and the help of those that are also flags of commands.

To add an argument, add a field to `SharedOptions` and a parameter to `LLM` (a test compares the two); every command
that takes the engine options then has the flag. Nothing heavy is imported here, as the command line needs it first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from sageLLM.runtime.scheduler.config import PDSchedulerConfig
    from sageLLM.runtime.scheduler.forecast import ServiceObjective


class Option(NamedTuple):
    """Help of an option; its flag if the name of the field is not it; the parser of a text; bounds of a number; the
    environment variable that it is read from.
    """

    help: str
    flag: str | None = None
    parser: Callable[[str], int] | None = None
    min: float | None = None
    max: float | None = None
    environment: str | None = None


_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_count(text: str) -> int:
    """The integer of a text such as 4096, 32k (32,000) or 32K (32,768), as in vLLM. ValueError for any other text."""
    digits, scale = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1)
    try:
        return round(float(digits) * scale) if scale > 1 else int(digits)
    except (ValueError, OverflowError):
        raise ValueError(f"expected a number such as 4096, 32k or 32K, got {text!r}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedOptions:
    """Arguments that are the same for `LLM` and for commands. Their names are those of vLLM, where it has them."""

    device: Annotated[str, Option("cpu, or cuda on a machine with a GPU.")] = "cpu"
    dtype: Annotated[str, Option("auto, float32, bfloat16 or float16.")] = "auto"
    kernels: Annotated[
        Literal["auto", "reference", "cpu", "triton"],
        Option("The generated kernels of a device, or the torch references."),
    ] = "auto"
    max_model_len: Annotated[
        int | None, Option("Length of the longest sequence, in tokens, such as 4096 or 32k.", parser=parse_count)
    ] = None
    block_size: Annotated[int, Option("Tokens per KV block.")] = 16
    num_kv_blocks: Annotated[
        int | None, Option("KV blocks of each pool (default: 1 GiB, or the longest sequence).", parser=parse_count)
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"], Option("The KV cache in 8 bits per element, or (auto) in the element type.")
    ] = "auto"
    activation_dtype: Annotated[
        Literal["auto", "int8"],
        Option("int8: round activations of products with integer weights to 8 bits, which is faster (W8A8, W4A8)."),
    ] = "auto"
    gpu_memory_utilization: Annotated[
        float, Option("Fraction of a GPU's memory for weights, steps and KV, without --num-kv-blocks.")
    ] = 0.9
    enforce_eager: Annotated[bool, Option("Capture no CUDA graphs.")] = False
    enable_prefix_caching: Annotated[bool, Option("Reuse the KV of equal prompt prefixes.")] = True
    swap_space: Annotated[float, Option("GiB of host memory to which preempted requests are swapped.")] = 0.0
    disk_space: Annotated[float, Option("GiB of files to which preempted requests are swapped.")] = 0.0
    disk_folder: Annotated[Path | None, Option("Folder of these files (default: temporary files).")] = None
    kv_tier: Annotated[
        Literal["device", "host", "disk"], Option("The tier of the KV of running requests beyond the pool.")
    ] = "device"
    kv_tier_space: Annotated[float, Option("GiB of that tier.")] = 4.0
    weights_tier: Annotated[
        Literal["device", "mapped", "disk"],
        Option("mapped: packed weights in a file, for fast starts; disk: read each layer from a file in each step."),
    ] = "device"
    weights_budget: Annotated[
        float | None, Option("GiB of memory for weights with this tier (default: as little as possible).")
    ] = None
    weights_folder: Annotated[Path | None, Option("Folder of the file of weights (default: the user's cache).")] = None
    generation_config: Annotated[
        str, Option("'auto', 'vllm', or a folder: the source of the default sampling parameters.")
    ] = "auto"
    async_scheduling: Annotated[
        bool, Option("Plan each step while the one before it runs; the answers do not depend on it.")
    ] = True
    tensor_parallel_size: Annotated[int, Option("Worker processes that share each layer.")] = 1
    pipeline_parallel_size: Annotated[int, Option("Stages that the layers are divided into.")] = 1
    pp_layer_partition: Annotated[
        str | None, Option("Layers of each stage, such as 20,10 (default: balanced by the weights that a step reads).")
    ] = None
    enable_expert_parallel: Annotated[bool, Option("Divide experts over these workers whole, not each of them.")] = (
        False
    )
    nnodes: Annotated[int | None, Option("Hosts of the ranks; the engine is on node 0.")] = None
    node_rank: Annotated[int | None, Option("Number of this host; others than 0 run their ranks only.")] = None
    master_addr: Annotated[str | None, Option("Address of node 0 (default: 127.0.0.1).")] = None
    master_port: Annotated[int | None, Option("Port of node 0 (default: 29501).")] = None
    distributed_executor_backend: Annotated[
        Literal["uni", "mp"] | None, Option("Run the model in this process, or in worker processes.")
    ] = None
    num_ubatches: Annotated[int, Option("Micro-batches of a step; one computes while another communicates.")] = 1
    overlap_transfers: Annotated[
        bool | None, Option("Run collectives next to computation (default: if cores are free).")
    ] = None
    af: Annotated[
        str | None, Option("A:F, such as 2:1: numbers of attention workers and of FFN workers, in processes.")
    ] = None
    prefill_workers: Annotated[
        int | None, Option("Prefill workers in separate processes; with --pd strict and --decode-workers.")
    ] = None
    decode_workers: Annotated[int | None, Option("Decode workers in separate processes.")] = None
    prefill_tensor_parallel_size: Annotated[
        int | None, Option("Ranks of a prefill worker (default: --tensor-parallel-size).")
    ] = None
    decode_tensor_parallel_size: Annotated[
        int | None, Option("Ranks of a decode worker (default: --tensor-parallel-size).")
    ] = None
    decode_block_size: Annotated[int | None, Option("Tokens per KV block of decode workers.")] = None
    kv_transport: Annotated[
        Literal["shared_memory", "tcp", "nixl"], Option("Transport of KV from prefill to decode workers.")
    ] = "shared_memory"
    kv_load_failure_policy: Annotated[
        Literal["recompute", "fail"], Option("Treatment of requests with KV that cannot be copied.")
    ] = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMOptions(SharedOptions):
    """All arguments of `LLM` but the model."""

    scheduler: PDSchedulerConfig | None = None
    objective: ServiceObjective | None = None
    plugins: Sequence[str | Path] = ()
    disable_passes: Sequence[str] = ()
    skip_tokenizer: bool = False
    kv_events_config: str | dict[str, Any] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> LLMOptions:
        """The options among the arguments of `LLM`, which has one for each."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})

    @property
    def config(self) -> PDSchedulerConfig:
        """The config of the scheduler, by default in mode "hybrid"."""
        from sageLLM.runtime.scheduler.config import PDSchedulerConfig

        return self.scheduler or PDSchedulerConfig(mode="hybrid")
