"""Costs and memory of the planner's workers, from the model's graph and a hardware entry."""

from typing import Any

from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.attention_ffn_cost import AttentionFfn, AttentionFfnStepCost
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost
from sageLLM.runtime.scheduler.batch import KVBudget
from sageLLM.runtime.scheduler.step_cost import StepCostModel
from sageLLM.runtime.sim.modes import RoleSetup
from sageLLM.runtime.sim.overheads import AddedCost
from sageLLM.runtime.sim.pipeline import WHOLE

BLOCK_SIZE = 16


class ModelWorkers:
    """Workers of one model on one kind of device; each must hold the KV of `longest` tokens."""

    def __init__(self, layout: ModelLayout, config: Any, hardware: Hardware, longest: int) -> None:
        self._layout, self._config, self._hardware, self._longest = layout, config, hardware, longest
        self._costs: dict[int, RooflineStepCost] = {}
        self._workers: dict[tuple[int, int], RoleSetup | None] = {}

    def degrees(self, num_devices: int) -> list[int]:
        """The tensor-parallel degrees, powers of two, that divide the model's sizes."""
        found, tp = [], 1
        while tp <= num_devices and self._divides(tp):
            found.append(tp)
            tp *= 2
        return found

    def worker(self, tp: int, pp: int) -> RoleSetup | None:
        """A worker of `tp` x `pp` devices; None if the model and the longest request do not fit."""
        if (tp, pp) not in self._workers:
            self._workers[tp, pp] = self._worker(tp, pp)
        return self._workers[tp, pp]

    def transfer_s(self, tp: int, num_tokens: int) -> float:
        """Seconds to transfer the KV of tokens from or to a worker."""
        return self._cost(tp).transfer_s(num_tokens)

    def attention_ffn(self, num_attention: int, num_ffn: int, num_ubatches: int) -> RoleSetup | None:
        """An attention worker with so many others, and FFN workers; None if either side does not fit."""
        cost = AttentionFfnStepCost(self._cost(1), self._layout, AttentionFfn(num_attention, num_ffn, num_ubatches))
        return self._fitting(cost, cost.num_kv_blocks(BLOCK_SIZE))

    def _worker(self, tp: int, pp: int) -> RoleSetup | None:
        roofline = self._cost(tp)
        cost: StepCostModel = roofline
        if pp > self._config.L:
            return None
        if pp > 1:
            cost = AddedCost(roofline, [lambda work: (pp - 1) * roofline.stage_transfer_s(work.num_tokens)])
        num_blocks = roofline.num_kv_blocks(BLOCK_SIZE, pipeline_depth=pp)
        return self._fitting(cost, num_blocks, roofline.stage_shares(pp))

    def _fitting(
        self, cost: StepCostModel, num_blocks: int, stage_shares: tuple[float, ...] = WHOLE
    ) -> RoleSetup | None:
        """The worker, if each share of its KV, one per step in flight, holds the longest request."""
        if num_blocks // len(stage_shares) * BLOCK_SIZE < self._longest:
            return None
        return RoleSetup(cost, KVBudget(num_blocks, BLOCK_SIZE), stage_shares)

    def _cost(self, tp: int) -> RooflineStepCost:
        if tp not in self._costs:
            self._costs[tp] = RooflineStepCost(self._layout, self._config, self._hardware, tensor_parallel_size=tp)
        return self._costs[tp]

    def _divides(self, tp: int) -> bool:
        try:
            self._layout.shard_config(self._config, tp)
        except SageError:
            return False
        return True
