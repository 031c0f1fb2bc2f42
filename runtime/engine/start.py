"""Starts the engine of an `LLM`: the executors of its workers, with a scheduler and a KV cache for each."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sageLLM.runtime.engine.disaggregated import DisaggregatedEngine
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.engine_group import EngineGroup
from sageLLM.runtime.engine.group_pipeline import Events
from sageLLM.runtime.engine.parallelism import Parallelism, PdWorkers
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.text.tokenizer import Tokenizer
from sageLLM.runtime.worker.build import WorkerSpec, make_local_executor
from sageLLM.runtime.worker.cluster import Cluster
from sageLLM.runtime.worker.disaggregation import start_disaggregated
from sageLLM.runtime.worker.executor import Executor
from sageLLM.runtime.worker.ffn_workers import FfnWorkers
from sageLLM.runtime.worker.prefill_decode import RoleSpec, make_group, start_group
from sageLLM.runtime.worker.process_executor import ProcessExecutor


class StartedWorkers(NamedTuple):
    """An executor per engine, and the FFN workers of attention-FFN disaggregation."""

    executors: list[Executor]
    ffn_workers: FfnWorkers | None


class StartedEngine(NamedTuple):
    """An engine, and the FFN workers of attention-FFN disaggregation; no engine for a model without text."""

    engine: Engine | None
    ffn_workers: FfnWorkers | None


def start_engine(
    spec: WorkerSpec,
    parallelism: Parallelism,
    model: Model,
    tokenizer: Tokenizer | None,
    compiler: ModelCompiler,
    config: PDSchedulerConfig,
    grammars: GrammarCompiler,
    *,
    objective: ServiceObjective | None,
    eos_token_ids: frozenset[int],
    async_scheduling: bool,
) -> StartedEngine:
    """Starts the workers, and an engine over them. Raises what `ProcessExecutor` raises.

    `grammars` check requests, if there is a tokenizer.
    """
    checks = None if tokenizer is None else grammars
    if parallelism.pd is not None:
        engine = start_prefill_decode(
            spec,
            parallelism.pd,
            model,
            tokenizer,
            compiler,
            config,
            checks,
            eos_token_ids=eos_token_ids,
            async_scheduling=async_scheduling,
        )
        return StartedEngine(engine, None)
    executors, ffn_workers = start_workers(
        spec, parallelism, model, compiler, config, grammars, is_async=async_scheduling
    )
    engine = make_engine(
        executors,
        spec,
        model,
        tokenizer,
        compiler,
        config,
        checks,
        objective=objective,
        eos_token_ids=eos_token_ids,
        async_scheduling=async_scheduling,
    )
    return StartedEngine(engine, ffn_workers)


def start_prefill_decode(
    spec: WorkerSpec,
    pd: PdWorkers,
    model: Model,
    tokenizer: Tokenizer | None,
    compiler: ModelCompiler,
    config: PDSchedulerConfig,
    grammars: GrammarCompiler | None,
    *,
    eos_token_ids: frozenset[int],
    async_scheduling: bool,
) -> Engine:
    """Prefill and decode workers in processes, with their engine."""
    budget = spec.budget
    decode_budget = budget
    if pd.decode_block_size is not None:
        num_blocks = budget.num_blocks * budget.block_size // pd.decode_block_size
        decode_budget = replace(budget, num_blocks=num_blocks, block_size=pd.decode_block_size)
    workers = [RoleSpec("prefill", pd.prefill_tp, budget)] * pd.prefill
    workers += [RoleSpec("decode", pd.decode_tp, decode_budget)] * pd.decode
    group = make_group(model, workers, pd.transport)
    events = Events()
    executors = start_group(spec, workers, group, lambda number: lambda report: events.put((number, report)))
    return DisaggregatedEngine(
        model,
        tokenizer,
        compiler,
        config,
        [worker.budget for worker in workers],
        executors,
        [worker.role for worker in workers],
        group,
        events,
        policy=pd.policy,
        eos_token_ids=eos_token_ids,
        async_scheduling=async_scheduling,
        grammars=grammars,
    )


def start_workers(
    spec: WorkerSpec,
    parallelism: Parallelism,
    model: Model,
    compiler: ModelCompiler,
    config: PDSchedulerConfig,
    grammars: GrammarCompiler,
    *,
    is_async: bool,
) -> StartedWorkers:
    """The workers in this process, which share `grammars`, or in others. Raises what `ProcessExecutor` raises."""
    if parallelism.af is not None:
        ffn_workers, executors = start_disaggregated(spec, *parallelism.af, model, config)
        return StartedWorkers(executors, ffn_workers)
    if parallelism.backend == "mp":
        node = parallelism.node
        cluster = None if node is None else Cluster(node, parallelism.num_ranks)
        return StartedWorkers([ProcessExecutor(spec, cluster)], None)
    executor = make_local_executor(spec, model, compiler, is_async=is_async, grammars=grammars)
    return StartedWorkers([executor], None)


def make_engine(
    executors: list[Executor],
    spec: WorkerSpec,
    model: Model,
    tokenizer: Tokenizer | None,
    compiler: ModelCompiler,
    config: PDSchedulerConfig,
    grammars: GrammarCompiler | None,
    *,
    objective: ServiceObjective | None,
    eos_token_ids: frozenset[int],
    async_scheduling: bool,
) -> Engine:
    """An engine over one executor, or several as a group that requests are divided among. `grammars` check requests."""
    engines = [
        Engine(
            model,
            tokenizer,
            compiler,
            config,
            spec.budget,
            executor,
            objective=objective,
            eos_token_ids=eos_token_ids,
            async_scheduling=async_scheduling,
            num_stages=spec.pp,
            grammars=grammars,
        )
        for executor in executors
    ]
    return engines[0] if len(engines) == 1 else EngineGroup(engines)
