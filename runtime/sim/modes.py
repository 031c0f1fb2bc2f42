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
from sageLLM.runtime.sim.cluster import Cluster, Colocated, EventQueue, Kind, Lockstep, MakeCluster
from sageLLM.runtime.sim.disaggregated import Disaggregated, Paired
from sageLLM.runtime.sim.pipeline import WHOLE
from sageLLM.runtime.sim.worker import MakeScheduler, VirtualClock

SimMode = Literal["strict", "prefill_first", "time_share", "hybrid", "vllm", "auto"]
RoleName = Literal["prefill", "decode"]
DEFAULT_KV = KVBudget(num_blocks=2**18)
"""The budget of the running-first scheduler, which cannot be unbounded, if none is set."""


@dataclass(frozen=True, slots=True)
class RoleSetup:
    """Workers of one role: the cost of a step, the KV of a worker (None: unbounded), and its stages (None: as all).

    `stage_shares` are the parts of the time of a step that its stages take.
    """

    cost: StepCostModel
    kv_budget: KVBudget | None = None
    stage_shares: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings common to all modes: the cost of a step, the KV of a worker, and the number of workers.

    Strict mode has `num_prefill` prefill workers and `num_decode` decode workers; the other modes have the same total,
    or `num_workers`, each worker with a share of the requests. `roles` can override cost and KV of the two roles.
    A worker is a pipeline with a stage for each of `stage_shares`, its part of the time of a step; `cost` is that of
    all stages together. In modes besides strict, groups of `expert_parallel_size` workers step together.

    With `async_scheduling` a worker plans each step when the one before it starts, as the engine does. It has no effect
    in strict mode and in pipelines. `vllm` are the workers of mode vllm (None: as all), since vLLM divides layers among
    stages differently; `full_sequence_must_fit` and `long_prefill_token_threshold` are settings of mode
    vllm only (`RunningFirstConfig`).
    """

    cost: StepCostModel
    transfer_s: Callable[[int], float]
    kv_budget: KVBudget | None = None
    num_prefill: int = 1
    num_decode: int = 1
    scheduler: PDSchedulerConfig = field(default_factory=PDSchedulerConfig)
    num_workers: int | None = None
    roles: Mapping[RoleName, RoleSetup] = field(default_factory=dict)
    stage_shares: tuple[float, ...] = WHOLE
    expert_parallel_size: int = 1
    enable_prefix_caching: bool = True
    max_model_len: int | None = None
    full_sequence_must_fit: bool = True
    long_prefill_token_threshold: int = 0
    async_scheduling: bool = False
    objective: ServiceObjective = field(default_factory=ServiceObjective)
    vllm: RoleSetup | None = None

    @property
    def plans_ahead(self) -> bool:
        """Whether workers with both phases plan a step ahead."""
        return self.async_scheduling and len(self.stage_shares) == 1

    def role(self, name: RoleName) -> RoleSetup:
        """The workers of a role."""
        return self.roles.get(name) or RoleSetup(self.cost, self.kv_budget)


def make_cluster(mode: SimMode, setup: Setup) -> MakeCluster:
    """A factory of the mode's workers, for a simulation."""
    setup = replace(setup, scheduler=replace(setup.scheduler, enable_prefix_caching=setup.enable_prefix_caching))
    if mode == "strict":
        return lambda events: _strict(events, setup)
    if mode == "vllm":
        setup = _as_vllm(setup)
        return _colocated(_running_first(setup), setup, shares_scheduler=True)
    if mode == "auto":
        return _colocated(_auto(setup), setup)
    if mode == "prefill_first":
        config = replace(setup.scheduler, mode="time_share", max_consecutive_decodes=0)
    else:
        config = replace(setup.scheduler, mode=mode)
    return _colocated(_pd_scheduler(config, _share(setup.kv_budget, setup.stage_shares), setup.max_model_len), setup)


def _as_vllm(setup: Setup) -> Setup:
    """The setup with the stages and the KV of vLLM's workers."""
    if (vllm := setup.vllm) is None:
        return setup
    stage_shares = vllm.stage_shares or setup.stage_shares
    return replace(setup, cost=vllm.cost, kv_budget=vllm.kv_budget, stage_shares=stage_shares)


def _colocated(make_scheduler: MakeScheduler, setup: Setup, shares_scheduler: bool = False) -> MakeCluster:
    num_workers = setup.num_workers or setup.num_prefill + setup.num_decode
    kind = Kind(make_scheduler, setup.cost, num_workers, setup.stage_shares, shares_scheduler, setup.plans_ahead)

    def build(events: EventQueue) -> Cluster:
        size = setup.expert_parallel_size
        return Lockstep(events, kind, size) if size > 1 else Colocated(events, kind)

    return build


def _share(budget: KVBudget | None, stage_shares: tuple[float, ...]) -> KVBudget | None:
    """The KV of one scheduler of a worker with a pipeline, which has as many schedulers as stages."""
    return None if budget is None else replace(budget, num_blocks=max(1, budget.num_blocks // len(stage_shares)))


def _strict(events: EventQueue, setup: Setup) -> Cluster:
    """One scheduler per pair of workers if the numbers are equal, else one per worker, with requests handed over."""
    prefill, decode = setup.role("prefill"), setup.role("decode")
    depths = {len(role.stage_shares or setup.stage_shares) for role in (prefill, decode)}
    if setup.num_prefill == setup.num_decode and depths == {1}:
        budget = _pair_budget(prefill.kv_budget, decode.kv_budget)
        strict = _pd_scheduler(replace(setup.scheduler, mode="strict"), budget, setup.max_model_len)
        return Paired(events, strict, (prefill.cost, decode.cost), setup.transfer_s, setup.num_prefill)
    return Disaggregated(
        events,
        _role_workers(setup, prefill, "time_share", setup.num_prefill),
        _role_workers(setup, decode, "hybrid", setup.num_decode),
        setup.transfer_s,
    )


def _pair_budget(prefill: KVBudget | None, decode: KVBudget | None) -> KVBudget | None:
    """The pools of a pair's scheduler."""
    if prefill is None or decode is None:
        return decode
    return replace(decode, num_prefill_blocks=prefill.num_blocks)


def _role_workers(setup: Setup, role: RoleSetup, mode: Literal["time_share", "hybrid"], num_workers: int) -> Kind:
    config = replace(setup.scheduler, mode=mode)
    shares = role.stage_shares or setup.stage_shares
    budget = _share(role.kv_budget, shares)
    return Kind(_pd_scheduler(config, budget, setup.max_model_len), role.cost, num_workers, shares)


def _pd_scheduler(
    config: PDSchedulerConfig, budget: KVBudget | None, max_model_len: int | None
) -> Callable[[VirtualClock], PDScheduler]:
    def make(clock: VirtualClock) -> PDScheduler:
        return PDScheduler(config, kv_budget=budget, max_model_len=max_model_len, clock=clock)

    return make


def _running_first(setup: Setup) -> MakeScheduler:
    """vLLM's policy with the same limits: one token budget per step for prompts and decodes."""
    limits = setup.scheduler
    config = RunningFirstConfig(
        limits.max_decode_batch_size,
        limits.max_prefill_tokens,
        long_prefill_token_threshold=setup.long_prefill_token_threshold,
        enable_prefix_caching=setup.enable_prefix_caching,
        full_sequence_must_fit=setup.full_sequence_must_fit,
        async_scheduling=setup.plans_ahead,
    )
    budget = setup.kv_budget or DEFAULT_KV

    def make(clock: VirtualClock) -> BaseScheduler:
        return RunningFirstScheduler(config, kv_budget=budget, max_model_len=setup.max_model_len, clock=clock)

    return make


def _auto(setup: Setup) -> MakeScheduler:
    """A scheduler per worker that selects its mode by the worker's own traffic."""
    config = replace(setup.scheduler, mode="auto")
    budget = _share(setup.kv_budget, setup.stage_shares)

    def make(clock: VirtualClock) -> BaseScheduler:
        chooser = ForecastChooser(setup.cost, setup.objective)
        return PDScheduler(
            config, kv_budget=budget, max_model_len=setup.max_model_len, clock=clock, mode_chooser=chooser
        )

    return make
