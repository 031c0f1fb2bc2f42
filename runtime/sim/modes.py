"""Deployments that `sagellm simulate` compares: a scheduler mode on a number of workers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sageLLM.runtime.scheduler.auto import ForecastChooser
from sageLLM.runtime.scheduler.base import BaseScheduler
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler, PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import StepCostModel
from sageLLM.runtime.sim.baselines.running_first import RunningFirstConfig, RunningFirstScheduler
from sageLLM.runtime.sim.simulator import Cluster, Colocated, Disaggregated, EventQueue, MakeCluster, Paired
from sageLLM.runtime.sim.worker import MakeScheduler, VirtualClock

SimMode = Literal["strict", "time_share", "hybrid", "vllm", "auto"]
DEFAULT_KV = KVBudget(num_blocks=2**18)
"""The budget of the running-first scheduler, which cannot be unbounded, if none is set."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings common to all modes: the cost of a step, the KV of a worker, and the number of workers.

    Strict mode has `num_prefill` prefill workers and `num_decode` decode workers; the other modes have the same total,
    each worker with a share of the requests. `costs` can override the cost model of "prefill" or "decode" workers.
    """

    cost: StepCostModel
    transfer_s: Callable[[int], float]
    kv_budget: KVBudget | None = None
    num_prefill: int = 1
    num_decode: int = 1
    scheduler: PDSchedulerConfig = field(default_factory=PDSchedulerConfig)
    costs: Mapping[str, StepCostModel] = field(default_factory=dict)
    enable_prefix_caching: bool = True
    objective: ServiceObjective = field(default_factory=ServiceObjective)

    @property
    def num_workers(self) -> int:
        return self.num_prefill + self.num_decode


def make_cluster(mode: SimMode, setup: Setup) -> MakeCluster:
    """A factory of the mode's workers, for a simulation."""
    setup = replace(setup, scheduler=replace(setup.scheduler, enable_prefix_caching=setup.enable_prefix_caching))
    if mode == "strict":
        return lambda events: _strict(events, setup)
    if mode == "vllm":
        return _colocated(_running_first(setup), setup)
    if mode == "auto":
        return _colocated(_auto(setup), setup)
    return _colocated(_pd_scheduler(replace(setup.scheduler, mode=mode), setup.kv_budget), setup)


def _colocated(make_scheduler: MakeScheduler, setup: Setup) -> MakeCluster:
    def build(events: EventQueue) -> Cluster:
        return Colocated(events, make_scheduler, setup.cost, setup.num_workers)

    return build


def _strict(events: EventQueue, setup: Setup) -> Cluster:
    """One scheduler per pair of workers if the numbers are equal, else one per worker, with requests handed over."""
    costs = setup.costs.get("prefill", setup.cost), setup.costs.get("decode", setup.cost)
    if setup.num_prefill == setup.num_decode:
        strict = _pd_scheduler(replace(setup.scheduler, mode="strict"), setup.kv_budget)
        return Paired(events, strict, costs, setup.transfer_s, setup.num_prefill)
    prefill = _pd_scheduler(replace(setup.scheduler, mode="time_share"), setup.kv_budget)
    decode = _pd_scheduler(replace(setup.scheduler, mode="hybrid"), setup.kv_budget)
    return Disaggregated(
        events, (prefill, costs[0], setup.num_prefill), (decode, costs[1], setup.num_decode), setup.transfer_s
    )


def _pd_scheduler(config: PDSchedulerConfig, budget: KVBudget | None) -> Callable[[VirtualClock], PDScheduler]:
    def make(clock: VirtualClock) -> PDScheduler:
        return PDScheduler(config, kv_budget=budget, clock=clock)

    return make


def _running_first(setup: Setup) -> MakeScheduler:
    """vLLM's policy with the same limits: one token budget per step for prompts and decodes."""
    limits = setup.scheduler
    config = RunningFirstConfig(
        limits.max_decode_batch_size,
        limits.max_prefill_tokens,
        enable_prefix_caching=setup.enable_prefix_caching,
    )
    budget = setup.kv_budget or DEFAULT_KV

    def make(clock: VirtualClock) -> BaseScheduler:
        return RunningFirstScheduler(config, kv_budget=budget, clock=clock)

    return make


def _auto(setup: Setup) -> MakeScheduler:
    """A scheduler per worker that selects its mode by the worker's own traffic."""
    config = replace(setup.scheduler, mode="auto")

    def make(clock: VirtualClock) -> BaseScheduler:
        chooser = ForecastChooser(setup.cost, setup.objective)
        return PDScheduler(config, kv_budget=setup.kv_budget, clock=clock, mode_chooser=chooser)

    return make
