"""Arguments of a worker, and the construction of its part of the model, in a worker process or in this one."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import torch

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.execution_graph.attention_ffn import Side
from sageLLM.runtime.execution_graph.embedding import poolings_of
from sageLLM.runtime.executor.kernel_choice import choose_planner, reads_codes
from sageLLM.runtime.executor.model_compiler import ModelCompiler, Schedule
from sageLLM.runtime.executor.scheduling import choose_schedule
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kv.copies import Tier
from sageLLM.runtime.loader.mapped_weights import place_mapped
from sageLLM.runtime.loader.model import Model, load_model
from sageLLM.runtime.loader.packed_weights import packed_file
from sageLLM.runtime.loader.weight_stream import WeightStream, gathered_tables
from sageLLM.runtime.registry.plugins import Registry, load_registry
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.worker.af_workers import AttentionLinks
from sageLLM.runtime.worker.executor import InProcessExecutor
from sageLLM.runtime.worker.kv_group import KVGroup
from sageLLM.runtime.worker.kv_pool import LowerTier
from sageLLM.runtime.worker.token_return import TokenReturn
from sageLLM.runtime.worker.warm_up import StepLimits

WeightsTier: TypeAlias = Literal["device", "mapped", "disk"]
"""The tier that keeps the weights; from "disk" the weights of each layer are read in each step."""


class WeightsPlacement(msgspec.Struct, frozen=True):
    """The tier of the weights, the memory for them in bytes, and the folder of their files (None: the user's cache)."""

    tier: WeightsTier = "device"
    budget: int | None = None
    folder: str | None = None


DESCRIPTORS = ("rendezvous_file", "shared_memory", "link_memory", "af_channel")
"""The fields of `WorkerSpec` that are descriptors; its group has more."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """One rank of `tp` tensor-parallel ranks in each of `pp` pipeline stages.

    The ranks of a stage follow each other. The other fields are the arguments of `LLM` of the same names. `rendezvous`
    is a file that the ranks share to find each other, or for several hosts the address HOST:PORT of a TCP store, and
    `rendezvous_file` the descriptor of such a file.
    `host_ranks` are the ranks on the same host. `shared_memory` and `link_memory` are descriptors of memory for the
    collectives of the stage, and for the messages between the ranks of the host, of the CPU kernels.

    `side` is the role in attention-FFN disaggregation, with `num_workers` workers of both roles, of which
    `num_ffn` are FFN workers, and `af_channel` the descriptor of a Unix socket over which the engine's process sends
    links to the workers of the other role.

    `group` is set for a prefill or decode worker that copies KV from or to others. `core_sets` are the cores of
    each rank; without them the system decides.
    """

    model: str
    dtype: str
    device: str
    kernels: str
    max_model_len: int
    budget: KVBudget
    is_split: bool
    plugins: list[str] = []
    disable_passes: list[str] = []
    disk_folder: str | None = None
    rank: int = 0
    tp: int = 1
    weights: WeightsPlacement = WeightsPlacement()
    pp: int = 1
    pp_layer_partition: str | None = None
    kv_tier: Tier = "device"
    rendezvous: str | None = None
    rendezvous_file: int | None = None
    shared_memory: int | None = None
    enable_expert_parallel: bool = False
    num_ubatches: int = 1
    overlap_transfers: bool | None = None
    link_memory: int | None = None
    side: Side | None = None
    num_workers: int = 1
    num_ffn: int = 0
    af_channel: int | None = None
    group: KVGroup | None = None
    core_sets: list[list[int]] = []
    host_ranks: list[int] = []
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    max_num_prompts: int = 32
    enforce_eager: bool = False
    kv_cache_dtype: str = "auto"
    activation_dtype: str = "auto"

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def stage(self) -> int:
        """The number of this rank's pipeline stage."""
        return self.rank // self.tp

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp - 1

    @property
    def returns_results(self) -> bool:
        """Whether this rank sends the results of steps to the engine: the first one of the last stage."""
        return self.rank == (self.pp - 1) * self.tp

    @property
    def cores(self) -> list[int]:
        """The cores of this rank, if it does not share them with other ranks."""
        return self.core_sets[self.rank] if self.core_sets else []

    @property
    def pool_memory(self) -> int | None:
        """The descriptor of the memory of this rank's pool, if other workers map it."""
        if self.group is None or self.group.transport != "shared_memory":
            return None
        return self.group.members[self.group.worker].memory[self.rank]

    @property
    def files(self) -> list[int]:
        """All descriptors, in the order of `with_files`."""
        own = [file for name in DESCRIPTORS if (file := getattr(self, name)) is not None]
        return own + ([] if self.group is None else self.group.files)

    def with_files(self, files: Sequence[int]) -> WorkerSpec:
        """The spec in a process where its descriptors have these numbers."""
        left = iter(files)
        own = {name: next(left) for name in DESCRIPTORS if getattr(self, name) is not None}
        group = None if self.group is None else self.group.with_files(left)
        return msgspec.structs.replace(self, group=group, **own)

    def ranks_of_stage(self, stage: int) -> list[int]:
        return list(range(stage * self.tp, (stage + 1) * self.tp))

    @property
    def stage_peers(self) -> list[int]:
        """The ranks, one per stage, that this rank exchanges activations and tokens with."""
        return list(range(self.rank % self.tp, self.num_ranks, self.tp))


def build_executor(spec: WorkerSpec, token_return: TokenReturn | None = None) -> InProcessExecutor:
    """Loads the rank's share of the model and builds its workers. Raises what `load_model` raises."""
    registry = load_registry(spec.plugins)
    device = torch.device(spec.device)
    model = load_model(
        Path(spec.model),
        registry,
        dtype=spec.dtype,
        device=device,
        max_model_len=spec.max_model_len,
        rank=spec.rank,
        tp=spec.tp,
        pp=spec.pp,
        pp_layer_partition=spec.pp_layer_partition,
        role=None if spec.side is None else spec.side.role,
        expert_parallel=spec.enable_expert_parallel,
        is_streamed=spec.weights.tier != "device",
        keeps_codes=reads_codes(spec.kernels, device),
        kv_cache_dtype=spec.kv_cache_dtype,
        activation_dtype=spec.activation_dtype,
    )
    links = None
    if spec.side is not None and spec.af_channel is not None:
        channel = socket.socket(fileno=spec.af_channel)
        links = AttentionLinks(channel, spec.side, find_compiler() if spec.device == "cpu" else None)
    overrides = None if links is None else links.kernels
    schedule = choose_schedule(
        device, {"tp": spec.tp}, num_processes=len(spec.host_ranks), overlap_transfers=spec.overlap_transfers
    )
    compiler = make_compiler(
        model,
        registry,
        spec.kernels,
        spec.disable_passes,
        schedule,
        side=spec.side,
        overrides=overrides,
        captures=not spec.enforce_eager and spec.side is None,
    )
    place_weights(model, compiler, Path(spec.model), spec.weights, keeps_codes=reads_codes(spec.kernels, device))
    return make_local_executor(spec, model, compiler, is_async=False, token_return=token_return, links=links)


def make_local_executor(
    spec: WorkerSpec,
    model: Model,
    compiler: ModelCompiler,
    *,
    is_async: bool,
    grammars: GrammarCompiler | None = None,
    token_return: TokenReturn | None = None,
    links: AttentionLinks | None = None,
) -> InProcessExecutor:
    """Workers in this process, for a model with packed weights; with `links` to FFN workers.

    `grammars` are shared with the engine, if that is in this process.
    """
    disk_folder = None if spec.disk_folder is None else Path(spec.disk_folder)
    lower_tier = None
    if spec.budget.num_lower_blocks:
        folder = disk_folder or Path(tempfile.gettempdir())
        lower_tier = LowerTier(spec.budget.num_lower_blocks, folder if spec.kv_tier == "disk" else None)
    return InProcessExecutor(
        model,
        compiler,
        spec.budget,
        is_split=spec.is_split,
        is_async=is_async,
        disk_folder=disk_folder,
        isolates_failures=spec.num_ranks == 1,
        num_ubatches=spec.num_ubatches,
        token_return=token_return,
        lower_tier=lower_tier,
        links=links,
        grammars=grammars or GrammarCompiler(Path(spec.model), model.config.V),
        pool_memory=spec.pool_memory,
        limits=StepLimits(spec.max_num_seqs, spec.max_num_batched_tokens, spec.max_num_prompts),
    )


def make_compiler(
    model: Model,
    registry: Registry,
    kernels: str,
    disable_passes: Sequence[str],
    schedule: Schedule | None = None,
    *,
    side: Side | None = None,
    overrides: Mapping[str, Kernel] | None = None,
    captures: bool = True,
) -> ModelCompiler:
    """The compiler of a model, with the planner for `kernels`, and a `schedule` of streams for several ranks.

    `overrides` take the place of reference kernels. On a GPU decode steps are captured in CUDA graphs if `captures`.
    """
    return ModelCompiler(
        model.layout,
        model.config,
        registry,
        dtype=model.short_dtype,
        disable=disable_passes,
        schedule=schedule,
        planner=choose_planner(
            kernels,
            registry,
            model.device,
            model.short_dtype,
            overrides,
            captures=captures,
            kv_form=model.kv_form,
            activations=model.activations,
        ),
        pipeline_stage=model.pipeline_stage,
        side=side,
        samples_locally=model.config.tp > 1,
        kv_form=model.kv_form,
    )


def place_weights(
    model: Model, compiler: ModelCompiler, checkpoint: Path, placement: WeightsPlacement, *, keeps_codes: bool
) -> None:
    """Brings the weights into the form that the kernels read. It must come before any plan binds them.

    For the other tiers the model has been loaded without weights: they are in a file, mapped or ("disk") those of its
    layers read in each step. Raises CheckpointError if the file cannot be made, and SageError for a budget that is too
    small.
    """
    graphs = _graphs(model, compiler)
    if placement.tier == "device":
        compiler.planner.prepare_weights(model.weights, model.ties, graphs)
        return
    folder = None if placement.folder is None else Path(placement.folder)
    if placement.tier == "mapped":
        place_mapped(model, checkpoint, compiler.registry, compiler.planner, graphs, folder, keeps_codes=keeps_codes)
        return
    file = packed_file(model, checkpoint, compiler.registry, compiler.planner, graphs, folder)
    gathered = gathered_tables(graphs, model.ties)
    stream = WeightStream(file, model.dtype, budget=placement.budget, gathered=gathered)
    model.weights.update(stream.weights)
    compiler.weight_stream = stream


def _graphs(model: Model, compiler: ModelCompiler) -> list[ExecutionGraph]:
    """Graphs that together read all of the model's weights, so that every weight is packed on loading."""
    layout = model.layout
    if model.generates:
        return [compiler.kernel_graph(stage) for stage in layout.phases]
    pooling = poolings_of(layout)
    return [compiler.embedding_graph(pooling[0], normalize=False)] if pooling else []
