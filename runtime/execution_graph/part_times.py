"""Node times for a part of a batch, by the cost model of the builder."""

from __future__ import annotations

from collections.abc import Mapping

from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.execution_graph.builder import DecodeBatch, ExecutionGraphBuilder, PrefillBatch


class PartTimes:
    """Times for passes that split a step into micro-batches: every part reads all weights, and launches all kernels.

    A part of a decode batch consists of its first requests; a part of a prefill batch of its first tokens, of as many
    prompts as these cover.
    """

    def __init__(self, builder: ExecutionGraphBuilder, batch: PrefillBatch | DecodeBatch) -> None:
        self.builder, self.batch = builder, batch
        self._times: dict[int, Mapping[str, float]] = {}

    def __call__(self, node: ExecutionNode, num_rows: int) -> float:
        """Microseconds of a node of the batch's graph for `num_rows` rows."""
        if num_rows not in self._times:  # one graph per size serves all nodes of the step
            self._times[num_rows] = self._times_of(num_rows)
        return self._times[num_rows].get(node.node_id, 0.0)

    def _times_of(self, num_rows: int) -> Mapping[str, float]:
        if isinstance(self.batch, DecodeBatch):
            ids, lengths = self.batch.request_ids[:num_rows], self.batch.context_lengths[:num_rows]
            graph = self.builder.build_decode_graph(DecodeBatch(ids, lengths, num_rows))
        else:
            lengths = _first_tokens(self.batch.input_lengths, num_rows)
            ids = self.batch.request_ids[: len(lengths)]
            graph = self.builder.build_prefill_graph(PrefillBatch(ids, lengths, num_rows))
        return {node_id: node.estimated_time_us for node_id, node in graph.nodes.items()}


def _first_tokens(lengths: list[int], count: int) -> list[int]:
    taken: list[int] = []
    for length in lengths:
        if count > 0:
            taken.append(min(length, count))
            count -= length
    return taken
