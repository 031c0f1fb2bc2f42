"""Runs the model on an attention worker: FFN workers run the feed-forwards, and a step that loses one is repeated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sageLLM.runtime.executor.planner import Runnable
from sageLLM.runtime.worker.af_workers import MAX_REPLAYS, AttentionLinks, ReceivedRows
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.micro_batch_inputs import ranges
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.step_inputs import Inputs


class AttentionRunner(ModelRunner):
    """A model runner with the attention's side of the graphs."""

    def __init__(self, *args: Any, links: AttentionLinks, **options: Any) -> None:
        super().__init__(*args, **options)
        self._links = links
        self._received: dict[int, ReceivedRows] = {}

    def _run_plan(self, plan: Runnable, num_ubatches: int, inputs: Inputs, num_tokens: int) -> list[Tensor]:
        received = self._received.get(id(plan))  # the runner keeps its plans, so their ids are unique
        if received is None:
            received = self._received[id(plan)] = ReceivedRows(plan.graph, self.model.device)
        rows = [end - first for first, end in ranges(num_tokens, num_ubatches)]
        inputs = {**inputs, **received.inputs(rows)}
        for replay in range(MAX_REPLAYS + 1):
            try:
                self._links.begin_step(rows)
                return plan.run(inputs)
            except Exception as error:
                if replay == MAX_REPLAYS or not self._links.is_loss(error):
                    raise
                LOG.warning("a step has lost an FFN worker and is repeated: %s", error)
                self._links.renew()
                self._links.num_replays += 1
        raise AssertionError("the loop returns or raises")
