"""The start of an `LLM` from its options: checks, the model, the size of the KV cache, and the engine."""

from __future__ import annotations

import logging
from contextlib import closing, nullcontext
from pathlib import Path
from typing import NamedTuple

from sageLLM.runtime.engine.arguments import (
    Backend,
    check_count,
    check_passes,
    parse_device,
    weights_placement,
    with_kv_options,
)
from sageLLM.runtime.engine.combinations import check_combinations
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.gpu_memory import (
    check_utilization,
    device_memory,
    kv_cache_bytes,
    step_bytes,
    unloaded_bytes,
)
from sageLLM.runtime.engine.kv_budget import KVCacheSize, choose_kv_cache_size, num_lower_blocks, num_tier_blocks
from sageLLM.runtime.engine.kv_events import KVEventPublisher, read_config
from sageLLM.runtime.engine.options import LLMOptions
from sageLLM.runtime.engine.parallelism import Parallelism, choose_parallelism
from sageLLM.runtime.engine.start import StartedEngine, start_engine
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor.kernel_choice import reads_codes
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.loader.model import Model, check_config, load_model, rank_config
from sageLLM.runtime.registry.plugins import Registry, load_registry
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.config import PDSchedulerConfig
from sageLLM.runtime.text.tokenizer import Tokenizer, read_eos_ids, start_probe
from sageLLM.runtime.worker.build import WeightsPlacement, WorkerSpec, make_compiler, place_weights
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.ffn_workers import FfnWorkers
from sageLLM.runtime.worker.node import serve_node


class StartedLLM(NamedTuple):
    """The parts of an `LLM`; without an engine for a model that only computes embeddings."""

    model: Model
    tokenizer: Tokenizer | None
    compiler: ModelCompiler
    config: PDSchedulerConfig
    kv_cache_size: KVCacheSize
    backend: Backend
    engine: Engine | None
    ffn_workers: FfnWorkers | None


def start_llm(folder: Path, options: LLMOptions) -> StartedLLM:
    """Starts the model of a checkpoint folder. Raises SageError for invalid options, and what `load_model` raises.

    On a host of other ranks it runs these, and ends the process with the engine (SystemExit).
    """
    weights, parallelism = check_options(options)
    if parallelism.node is not None and parallelism.node.node_rank > 0:
        serve_node(parallelism.node)
        raise SystemExit(0)
    registry = load_registry(options.plugins)
    check_passes(options.disable_passes, registry)
    model, tokenizer = load(folder, options, registry, weights, parallelism)
    compiler = make_compiler(
        model, registry, options.kernels, options.disable_passes, captures=not options.enforce_eager
    )
    grammars = GrammarCompiler(folder, model.config.V, tokenizer)
    if parallelism.backend == "uni":
        keeps_codes = reads_codes(options.kernels, model.device)
        place_weights(model, compiler, folder, weights, keeps_codes=keeps_codes)
    size = cache_size(model, compiler, options, parallelism)
    budget = kv_budget(model, options, size)
    config = with_kv_options(options.config, budget, options.enable_prefix_caching)
    started = StartedEngine(None, None)
    if model.generates:
        LOG.log(logging.WARNING if size.exceeds_default else logging.INFO, "%s", size)
        started = start_engine(
            worker_spec(folder, options, model, budget, config, weights),
            parallelism,
            model,
            tokenizer,
            compiler,
            config,
            grammars,
            objective=options.objective,
            eos_token_ids=read_eos_ids(folder),
            async_scheduling=options.async_scheduling,
        )
    events = read_config(options.kv_events_config)
    if events is not None and started.engine is not None:
        started.engine.publish_kv_events(KVEventPublisher(events, options.block_size))
    return StartedLLM(
        model, tokenizer, compiler, config, size, parallelism.backend, started.engine, started.ffn_workers
    )


def check_options(options: LLMOptions) -> tuple[WeightsPlacement, Parallelism]:
    """Checks what does not depend on the model; returns the place of the weights, and the workers.

    Raises SageError for an invalid option.
    """
    check_combinations(options, options.config.mode)
    parse_device(options.device)
    check_count("block_size", options.block_size)
    if options.num_kv_blocks is not None:
        check_count("num_kv_blocks", options.num_kv_blocks)
    check_utilization(options.gpu_memory_utilization)
    read_config(options.kv_events_config)
    weights = weights_placement(options.weights_tier, options.weights_budget, options.weights_folder)
    return weights, choose_parallelism(options)


def load(
    folder: Path, options: LLMOptions, registry: Registry, weights: WeightsPlacement, parallelism: Parallelism
) -> tuple[Model, Tokenizer | None]:
    """The model, with weights if it runs in this process, and its tokenizer, unless `skip_tokenizer`."""
    device = parse_device(options.device)
    check_config(folder, registry)  # before the tokenizer: what is wrong with the model comes first
    # The probe is a process, which runs while the weights are loaded.
    with nullcontext() if options.skip_tokenizer else closing(start_probe(folder)) as probe:
        model = load_model(
            folder,
            registry,
            dtype=options.dtype,
            device=device,
            max_model_len=options.max_model_len,
            tp=1 if parallelism.pd is not None else parallelism.tp,
            pp=parallelism.pp,
            pp_layer_partition=options.pp_layer_partition,
            expert_parallel=options.enable_expert_parallel,
            has_weights=parallelism.backend == "uni",
            is_streamed=weights.tier != "device",
            keeps_codes=reads_codes(options.kernels, device),
            kv_cache_dtype=options.kv_cache_dtype,
            activation_dtype=options.activation_dtype,
        )
        tokenizer = None if probe is None else Tokenizer.from_folder(folder, probe, model.max_model_len)
    if parallelism.af is not None and not model.generates:
        raise SageError(f"af must be None for {model.layout.name}, which computes embeddings")
    for option, degree in parallelism.role_degrees:  # the workers would find out after their start
        rank_config(model.layout, model.config, 0, degree, option, expert_parallel=options.enable_expert_parallel)
    return model, tokenizer


def cache_size(model: Model, compiler: ModelCompiler, options: LLMOptions, parallelism: Parallelism) -> KVCacheSize:
    """The size of each KV pool, and its reason."""
    config, block_size = options.config, options.block_size
    device_bytes = None
    memory = device_memory(model.device) if options.num_kv_blocks is None and model.generates else None
    if memory is not None:
        reserved = step_bytes(model, compiler, config, block_size)
        reserved += unloaded_bytes(model) if parallelism.backend == "mp" else 0
        device_bytes = kv_cache_bytes(memory, options.gpu_memory_utilization, reserved)
    num_pools = parallelism.num_pools(config.mode == "strict")
    return choose_kv_cache_size(model, config, block_size, options.num_kv_blocks, num_pools, device_bytes)


def kv_budget(model: Model, options: LLMOptions, size: KVCacheSize) -> KVBudget:
    """The blocks of the pools and of the tiers."""
    block_size = options.block_size
    return KVBudget(
        size.num_blocks,
        block_size,
        num_lower_blocks=num_lower_blocks(model, options.kv_tier, options.kv_tier_space, block_size),
        num_host_blocks=num_tier_blocks(model, "swap_space", options.swap_space, block_size),
        num_disk_blocks=num_tier_blocks(model, "disk_space", options.disk_space, block_size),
    )


def worker_spec(
    folder: Path,
    options: LLMOptions,
    model: Model,
    budget: KVBudget,
    config: PDSchedulerConfig,
    weights: WeightsPlacement,
) -> WorkerSpec:
    """The arguments of the workers: options of the same names as they are, and what follows from the others."""
    same = {name: getattr(options, name) for name in WorkerSpec.__struct_fields__ if hasattr(options, name)}
    derived = {
        "model": str(folder),
        "max_model_len": model.max_model_len,
        "budget": budget,
        "is_split": config.mode == "strict",
        "plugins": [str(plugin) for plugin in options.plugins],
        "disable_passes": list(options.disable_passes),
        "disk_folder": None if options.disk_folder is None else str(options.disk_folder),
        "weights": weights,
        "tp": options.tensor_parallel_size,
        "pp": options.pipeline_parallel_size,
        "max_num_seqs": config.max_decode_batch_size,
        "max_num_batched_tokens": config.max_prefill_tokens,
        "max_num_prompts": config.max_prefill_batch_size,
    }
    return WorkerSpec(**{**same, **derived})
