"""Prediction of step durations with attention and FFN workers, from the kernels of the two sides and a closed form.

A step goes through L layers in m micro-batches. With Ta and Te the times of a layer's two sides for one micro-batch, Tc
that of a transfer in one direction, and Tf = max(Ta, Te), it takes

    T(m) = (L - 1) max(m Tf, Ta + Te + 2 Tc) + (Ta + Te + 2 Tc) + (m - 1) Tf

as `benchmarks/af.py` measures it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from sageLLM.generated.ops.op_types import OpType
from sageLLM.runtime.core.cost import SECOND
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.step_cost import RooflineStepCost, weight_bytes
from sageLLM.runtime.execution_graph.step_tables import Experts, StepTables
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork

_NODE = re.compile(r"L\d+\.(\w+)\.")


@dataclass(frozen=True, slots=True)
class AttentionFfn:
    """Numbers of attention and FFN workers, and the micro-batches of a step.

    With `is_merged` an FFN worker computes the rows of all attention workers as one batch and has its share of the
    experts, and all attention workers step together. Without it, as in the engine, it has all weights, and computes the
    micro-batches of its attention workers one by one.
    """

    num_attention: int
    num_ffn: int
    num_ubatches: int = 2
    is_merged: bool = False


class AttentionFfnStepCost:
    """The duration of a step of one attention worker, all of which have as much work; `whole` is the model's cost."""

    def __init__(self, whole: RooflineStepCost, layout: ModelLayout, form: AttentionFfn) -> None:
        self.form = form
        self.whole = whole
        names = {name for name, block in layout.blocks.items() if OpType.FFN in block.op_type.values()}
        experts = Experts(whole.experts.num, whole.experts.per_token, form.num_ffn if form.is_merged else 1)
        self._ffn_graph = _part(whole.graph, lambda node: _block_of(node) in names)
        layers = _part(whole.graph, lambda node: node.layer_id is not None and _block_of(node) not in names)
        ends = _part(whole.graph, lambda node: node.layer_id is None)
        self._attention_graph = _part(whole.graph, lambda node: _block_of(node) not in names)
        fixed = {"tp": 1}
        self._ffn = StepTables(self._ffn_graph, whole.hardware, fixed, experts)
        self._attention = StepTables(layers, whole.hardware, fixed, Experts())
        self._ends = StepTables(ends, whole.hardware, fixed, Experts())
        self._experts = experts

    @property
    def num_devices(self) -> int:
        return self.form.num_attention + self.form.num_ffn

    @property
    def attention_bytes(self) -> int:
        """Bytes of the weights of an attention worker."""
        return weight_bytes(self._attention_graph, 1)

    @property
    def ffn_bytes(self) -> int:
        """Bytes of the weights of an FFN worker."""
        return weight_bytes(self._ffn_graph, self._experts.num_workers)

    def num_kv_blocks(self, block_size: int, memory_share: float = 0.9) -> int:
        """KV blocks of an attention worker; 0 if the weights of either side do not fit."""
        memory = self.whole.hardware.memory_bytes * memory_share
        if self.ffn_bytes > memory:
            return 0
        return max(0, int((memory - self.attention_bytes) // (self.whole.kv_bytes_per_token * block_size)))

    def step_s(self, work: StepWork) -> float:
        """Seconds of a step with this work; 0 without work."""
        if not work.num_tokens:
            return 0.0
        num_parts, num_layers = min(self.form.num_ubatches, work.num_tokens), self.whole.config.L
        attention, ffn, one_way = (time / num_layers for time in self._sides(_share(work, num_parts)))
        longer, loop = max(attention, ffn), attention + ffn + 2 * one_way
        body: float = (num_layers - 1) * max(num_parts * longer, loop) + loop + (num_parts - 1) * longer
        return body + self._ends.seconds(work)

    def _sides(self, part: StepWork) -> tuple[float, float, float]:
        """Seconds of all layers for one micro-batch: attention, FFN, and transfers in one direction."""
        ratio = self.form.num_attention / self.form.num_ffn
        copies = self._num_copies()
        row_bytes = self.whole.config.H * DTYPES[self.whole.dtype]
        num_bytes = part.num_tokens * copies * row_bytes * max(1.0, ratio)  # the busier of both ends
        link = self.whole.hardware.link.time_us(int(num_bytes)) / SECOND * self.whole.config.L
        if self.form.is_merged:
            rows = max(1, round(part.num_tokens * ratio))
            return self._attention.seconds(part), self._ffn.seconds(StepWork([PromptChunk(0, rows)])), link
        return self._attention.seconds(part), max(1.0, ratio) * self._ffn.seconds(part), link

    def _num_copies(self) -> float:
        """FFN workers that a row is sent to: those with any of its experts, if each has a share of them."""
        num, per_token = self._experts.num_workers, self._experts.per_token
        return num * (1 - (1 - 1 / num) ** per_token) if num > 1 and per_token else 1.0


def _block_of(node: ExecutionNode) -> str | None:
    found = _NODE.match(node.node_id)
    return found[1] if found else None


def _part(graph: ExecutionGraph, is_part: Callable[[ExecutionNode], bool]) -> ExecutionGraph:
    return graph.get_subgraph(node.node_id for node in graph.nodes.values() if is_part(node))


def _share(work: StepWork, num_parts: int) -> StepWork:
    """One of equal parts of a step's tokens; a prompt's chunk is divided, too."""
    if num_parts == 1:
        return work
    chunks = [replace_tokens(chunk, max(1, chunk.num_tokens // num_parts)) for chunk in work.prefill]
    decodes = -(-work.num_decodes // num_parts)
    return replace(work, prefill=chunks, num_decodes=decodes, num_context_tokens=work.num_context_tokens // num_parts)


def replace_tokens(chunk: PromptChunk, num_tokens: int) -> PromptChunk:
    """The middle part of a chunk, with the mean of the contexts of all parts."""
    return PromptChunk(chunk.start + (chunk.num_tokens - num_tokens) // 2, num_tokens)
