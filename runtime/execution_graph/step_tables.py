"""Tables of kernel times, affine in the sizes of a step, for fast predictions of step durations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sageLLM.runtime.core.cost import SECOND, Efficiency, Hardware, dtype_of, efficiency_of, estimate
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork

Vector = npt.NDArray[np.float64]
SIZES = ("Td", "Tp", "S", "KV", "QK", "EX")
"""Decode tokens, prompt tokens, sequences, cached tokens that are read, pairs of a query and a key it attends to, and
experts that the tokens select."""


class Experts(NamedTuple):
    """Experts of a layer in all and per token; none for a dense model. Each of `num_workers` has a share of them."""

    num: int = 0
    per_token: int = 0
    num_workers: int = 1

    def num_selected(self, num_tokens: int) -> float:
        """Expected number of a worker's experts that are selected, if every expert is equally likely.

        All workers have as many tokens.
        """
        if not self.num:
            return 0.0
        is_unselected = (1 - self.per_token / self.num) ** (num_tokens * self.num_workers)
        return self.num / self.num_workers * (1 - is_unselected)


def sizes_of(work: StepWork, experts: Experts) -> Vector:
    """1 for the constants, then SIZES."""
    num = work.num_decodes
    return np.array(_sizes(work.prefill, num, work.num_context_tokens, experts.num_selected(work.num_tokens)))


def _sizes(prefill: Sequence[PromptChunk], num_decodes: int, context: int, selected: float = 0.0) -> tuple[float, ...]:
    cached, pairs, num_prompt_tokens = context, context, 0
    for start, num_tokens in prefill:
        num_prompt_tokens += num_tokens
        cached += start + num_tokens
        pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return 1.0, num_decodes, num_prompt_tokens, num_decodes + len(prefill), cached, pairs, selected


class KernelTable:
    """Kernels: the coefficients of their times of arithmetic and of memory traffic in seconds, and the launches."""

    def __init__(
        self, compute_s: Vector, memory_s: Vector, overlaps: Sequence[float | None], launch_s: float = 0.0
    ) -> None:
        self.launch_s = launch_s
        self._compute_s, self._memory_s = compute_s, memory_s
        self._coefficients = np.concatenate([compute_s, memory_s])
        self._overlaps = overlaps

    def __add__(self, other: "KernelTable") -> "KernelTable":
        """The kernels of both."""
        return KernelTable(
            np.concatenate([self._compute_s, other._compute_s]),
            np.concatenate([self._memory_s, other._memory_s]),
            [*self._overlaps, *other._overlaps],
            self.launch_s + other.launch_s,
        )

    def __len__(self) -> int:
        """The number of distinct kernels."""
        return len(self._overlaps)

    def limit_s(self, sizes: Vector) -> float:
        """Seconds of all kernels without their launches."""
        # A graph has about ten distinct kernels: for so few the loop is faster than operations on arrays.
        times = (self._coefficients @ sizes).tolist()
        num = len(self._overlaps)
        return sum(map(_combined, times[:num], times[num:], self._overlaps))

    def limits_s(self, sizes: Vector, parts: Sequence[tuple[int, int]]) -> float:
        """Seconds of all kernels, each at a row of `sizes`: (number of kernels, row) for each part of the table."""
        times = (sizes @ self._coefficients.T).tolist()
        num, first, total = len(self._overlaps), 0, 0.0
        for count, row in parts:
            end = first + count
            compute, memory = times[row][first:end], times[row][num + first : num + end]
            total += sum(map(_combined, compute, memory, self._overlaps[first:end]))
            first = end
        return total


def _combined(compute: float, memory: float, overlap: float | None) -> float:
    """`Efficiency.combined` of times that include the efficiency."""
    longer, shorter = (compute, memory) if compute > memory else (memory, compute)
    if overlap is None or shorter <= 0:
        return longer
    return float(longer * (1 + (shorter / longer) ** overlap) ** (1 / overlap))


class _Nodes:
    """Nodes with equal ones merged: the distinct ones, and the number of each."""

    def __init__(self, nodes: Sequence[OpNode], hardware: Hardware, fixed: Mapping[str, int]) -> None:
        texts = [f"{node.op} {node.flops({})} {node.bytes_moved({})}" for node in nodes]
        self._hardware = hardware
        self._fixed = fixed
        self._counts = Counter(texts)
        self._nodes = dict(zip(texts, nodes, strict=True))

    @property
    def num(self) -> int:
        return self._counts.total()

    @property
    def first(self) -> OpNode:
        return next(iter(self._nodes.values()))

    def table(self, efficiency: Efficiency | None = None) -> KernelTable:
        """The table of the nodes, at one efficiency or each at that of its family."""
        hardware = self._hardware
        compute_s, memory_s, overlaps, launch_us = [], [], [], 0.0
        for text, node in self._nodes.items():
            count = self._counts[text]
            reached = efficiency or efficiency_of(node, hardware)
            peak = hardware.peak_of(dtype_of(node, hardware)) * reached.compute
            compute_s.append(count * self._affine(node, 0) / peak)
            memory_s.append(count * self._affine(node, 1) / (hardware.memory_bandwidth * reached.memory))
            overlaps.append(reached.overlap)
            launch_us += count * hardware.launch_us(reached)
        shape = (len(self._nodes), len(SIZES) + 1)
        compute, memory = np.array(compute_s).reshape(shape), np.array(memory_s).reshape(shape)
        return KernelTable(compute, memory, overlaps, launch_us / SECOND)

    def seconds(self) -> Vector:
        """The coefficients of the total time in seconds, for nodes with times that are affine."""
        total = np.zeros(len(SIZES) + 1)
        for text, node in self._nodes.items():
            total += self._counts[text] * self._affine(node, 2) / SECOND
        return total

    def _affine(self, node: OpNode, index: int) -> Vector:
        """The constant and the slopes of one field of the node's cost, measured at 1 and 1025 units of each size."""
        base = dict.fromkeys(SIZES, 1)
        at_base = self._cost(node, index, base)
        slopes = [(self._cost(node, index, base | {size: 1025}) - at_base) / 1024 for size in SIZES]
        return np.array([at_base - sum(slopes), *slopes])

    def _cost(self, node: OpNode, index: int, sizes: Mapping[str, int]) -> float:
        env = {**sizes, **self._fixed, "T": sizes["Td"] + sizes["Tp"], "B": sizes["S"]}
        return float(estimate(node, self._hardware, env)[index])


class StepTables:
    """The kernels of a graph in three groups: on the device, attention, and collectives over links.

    Attention has an efficiency for prompts alone, for decodes alone, and "mixed_attn" for decodes in one kernel with
    prompts, which computes whole tiles of queries, of which a decode uses one row.
    """

    def __init__(self, graph: ExecutionGraph, hardware: Hardware, fixed: Mapping[str, int], experts: Experts) -> None:
        ops = [node for node in graph.nodes.values() if isinstance(node, OpNode) and not node.is_view]
        attention = _Nodes([node for node in ops if "attention" in node.tags], hardware, fixed)
        links = _Nodes([node for node in ops if node.op_type.is_comm], hardware, fixed)
        others = [node for node in ops if "attention" not in node.tags and not node.op_type.is_comm]
        self._experts = experts
        self._links = links.seconds()
        self._num_attention = attention.num
        self._prefill = efficiency_of(attention.first, hardware) if attention.num else Efficiency()
        self._decode = hardware.efficiency.get("decode_attn", self._prefill)
        self._mixed = hardware.efficiency.get("mixed_attn", self._decode)
        row = self._links[None, :]
        self._kernels = _Nodes(others, hardware, fixed).table() + KernelTable(np.zeros_like(row), row, [None])
        self._attention = {one: attention.table(one) for one in {self._prefill, self._decode, self._mixed}}
        self._whole = {one: self._kernels + self._attention[one] for one in self._attention}
        # A step of both phases: the kernels at all its sizes, attention at those of the prompts and of the decodes.
        prompts, decodes = self._attention[self._prefill], self._attention[self._mixed]
        self._both = self._kernels + prompts + decodes
        self._parts = [(len(table), row) for row, table in enumerate((self._kernels, prompts, decodes))]

    def link_s(self, work: StepWork) -> float:
        """Seconds of the step's collectives."""
        return float(self._links @ sizes_of(work, self._experts))

    def seconds(self, work: StepWork) -> float:
        """Seconds of the step."""
        num, context, selected = work.num_decodes, work.num_context_tokens, self._experts.num_selected(work.num_tokens)
        sizes = _sizes(work.prefill, num, context, selected)
        if not work.prefill:
            table = self._whole[self._decode]
            limit_s = table.limit_s(np.array(sizes))
        elif not num:
            table = self._whole[self._prefill]
            limit_s = table.limit_s(np.array(sizes))
        else:
            table = self._whole[self._mixed]
            prompts = _sizes(work.prefill, 0, 0)
            decodes = _sizes((), num, context)
            limit_s = self._both.limits_s(np.array((sizes, prompts, decodes)), self._parts)
        return limit_s + table.launch_s + self._num_attention * self._fixed_s(work)

    def _fixed_s(self, work: StepWork) -> float:
        """Seconds of an attention kernel that depend on the longest context and the number of decodes only."""
        num = work.num_decodes
        kind = self._prefill if not num else self._mixed if work.prefill else self._decode
        longest = work.num_context_tokens / num if num else 0.0
        for start, num_tokens in work.prefill:
            longest = max(longest, start + num_tokens)
        return kind.context_ns / 1e9 * longest + kind.sequence_us / SECOND * num
