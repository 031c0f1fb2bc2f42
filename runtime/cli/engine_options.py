"""Engine options of the commands that run a model: names, defaults and help, shared by `run`, `embed` and `bench`.

To add an option of `LLM`, add a field to `EngineOptions`; every command that takes the engine options then has it.
Nothing heavy is imported at the top, as in `options.py`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sageLLM.runtime.cli.options import Command, Option, as_command, keyword, parameters_of

if TYPE_CHECKING:
    from sageLLM.runtime.engine.llm import LLM
    from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_count(text: str) -> int:
    """The integer of a text such as 4096, 32k (32,000) or 32K (32,768), as in vLLM. ValueError for any other text."""
    digits, scale = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1)
    try:
        return round(float(digits) * scale) if scale > 1 else int(digits)
    except (ValueError, OverflowError):
        raise ValueError(f"expected a number such as 4096, 32k or 32K, got {text!r}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The arguments of `LLM`, and of its scheduler, as options of a command.

    Names are those of `LLM` and of vLLM; the defaults are those of `LLM` (a test compares them).
    """

    device: Annotated[str, Option("cpu, or cuda on a machine with a GPU.")] = "cpu"
    dtype: Annotated[str, Option("auto, float32, bfloat16 or float16.")] = "auto"
    kernels: Annotated[
        Literal["auto", "reference", "cpu", "triton"],
        Option("The generated kernels of a device, or the torch references."),
    ] = "auto"
    pd: Annotated[
        Literal["strict", "time_share", "hybrid", "auto"], Option("The mode of the prefill/decode scheduler.")
    ] = "hybrid"
    max_model_len: Annotated[
        int | None, Option("Length of the longest sequence, in tokens, such as 4096 or 32k.", parser=parse_count)
    ] = None
    max_num_seqs: Annotated[int, Option("Requests per step.", parser=parse_count)] = 256
    max_num_batched_tokens: Annotated[int, Option("Tokens per step.", parser=parse_count)] = 4096
    prefill_chunk_size: Annotated[int, Option("Prompt tokens per hybrid step.", parser=parse_count)] = 512
    scheduling_policy: Annotated[
        Literal["fcfs", "priority", "deadline", "fair_share"], Option("Order of the requests.")
    ] = "priority"
    slo_ttft: Annotated[float, Option("Objective of mode auto for the time to first token, in seconds.")] = 1.0
    slo_tpot: Annotated[float, Option("The same for the time per output token after it.")] = 0.1
    block_size: Annotated[int, Option("Tokens per KV block.")] = 16
    num_kv_blocks: Annotated[
        int | None, Option("KV blocks of each pool (default: 1 GiB, or the longest sequence).", parser=parse_count)
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"], Option("The KV cache in 8 bits per element, or (auto) in the element type.")
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
        Literal["device", "disk"], Option("disk: read the weights of each layer from a file in each step.")
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
    kv_events_config: Annotated[
        str | None, Option("JSON with vLLM's fields: publish changes of the prefix cache over ZeroMQ.")
    ] = None
    plugins: Annotated[list[Path] | None, Option("An additional generated folder; can be repeated.", "--plugin")] = None
    disable_passes: Annotated[str, Option("Graph passes to skip, separated by commas.")] = ""

    def scheduler(self) -> "PDSchedulerConfig":
        """The config of the scheduler. Raises ValueError for an invalid option."""
        from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig

        defaults = PDSchedulerConfig()
        return PDSchedulerConfig(
            mode=self.pd,
            max_prefill_batch_size=min(self.max_num_seqs, defaults.max_prefill_batch_size),
            max_decode_batch_size=self.max_num_seqs,
            max_prefill_tokens=self.max_num_batched_tokens,
            prefill_chunk_size=self.prefill_chunk_size,
            policy=self.scheduling_policy,
        )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `LLM`. Raises SageError for an invalid option."""
        from sageLLM.runtime.errors import SageError
        from sageLLM.runtime.scheduler.forecast import ServiceObjective

        own = {option.name: getattr(self, option.name) for option in fields(self) if option.name not in _NOT_OF_LLM}
        try:
            own["scheduler"] = self.scheduler()
            own["objective"] = ServiceObjective(self.slo_ttft, self.slo_tpot)
        except ValueError as error:
            raise SageError(str(error)) from None
        own["plugins"] = self.plugins or []
        own["disable_passes"] = [name for name in self.disable_passes.split(",") if name]
        return own

    def load(self, model: Path, **arguments: Any) -> "LLM":
        """The `LLM` of a checkpoint folder; `arguments` take precedence over the options."""
        from sageLLM.runtime.engine.llm import LLM

        return LLM(model, **{**self.arguments(), **arguments})


_NOT_OF_LLM = {
    "pd",
    "max_num_seqs",
    "max_num_batched_tokens",
    "prefill_chunk_size",
    "scheduling_policy",
    "slo_ttft",
    "slo_tpot",
}

EMBEDDING_OPTIONS = ("device", "dtype", "kernels", "max_model_len", "plugins", "disable_passes")
"""The options that matter without a KV cache and a scheduler."""


def with_engine_options(*names: str) -> Callable[[Command], Command]:
    """Replaces the parameter `engine: EngineOptions` of a Typer command by an option for each field, or for `names`."""

    def decorate(command: Command) -> Command:
        options = parameters_of(EngineOptions, names, panel="Engine")
        own = [one for one in inspect.signature(command).parameters.values() if one.name != "engine"]

        def run(**values: Any) -> None:
            engine = EngineOptions(**{option.name: values.pop(option.name) for option in options})
            command(**values, engine=engine)

        return as_command(run, command, [*(keyword(one.name, one.annotation, one.default) for one in own), *options])

    return decorate
