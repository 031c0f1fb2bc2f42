"""Numbers of layers of pipeline stages: balanced by the weights that a stage reads, set by the user, or as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.dims import product
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.execution_graph.block_graph import whole_block_graph
from sageLLM.runtime.execution_graph.expand import expand


class WeightReads(NamedTuple):
    """Bytes of the weights that a step reads before the layers, in each layer, and after the layers.

    All experts of a layer count, as a step of many rows reads them. A table of which single rows are gathered, such as
    the embedding, does not count.
    """

    before: int
    layers: tuple[int, ...]
    after: int

    def of_stages(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The bytes that each stage reads; `sizes` are its numbers of layers."""
        ends = (0, *accumulate(sizes))
        costs = self.by_layer
        return tuple(sum(costs[start:end]) for start, end in pairwise(ends))

    @property
    def by_layer(self) -> list[int]:
        """The bytes of each layer; those outside of layers count for the first or the last, on whose stage they are."""
        costs = list(self.layers)
        costs[0] += self.before
        costs[-1] += self.after
        return costs


def choose_sizes(
    layout: ModelLayout, config: Any, num_stages: int, partition: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The number of layers of each stage, for the config of a whole model.

    `partition` sets them; by default the largest number of bytes that one stage reads is as small as it can be. Raises
    ConfigError if there are more stages than layers, or for a partition that does not divide the layers.
    """
    if (reason := why_not_divisible(layout.name, config.L, num_stages)) is not None:
        raise ConfigError(reason)
    if partition is not None:
        _check_partition(partition, layout.name, config.L, num_stages)
        return tuple(partition)
    if num_stages == 1:
        return (config.L,)
    return balanced_sizes(weight_reads(layout, config), num_stages)


def vllm_sizes(layout: ModelLayout, config: Any, num_stages: int) -> tuple[int, ...]:
    """The number of layers of each stage in vLLM, for a simulation of it: equal numbers, whatever the layers read.

    Layers that remain go to the stages from the last but one towards the first. Source: `get_pp_indices` of vLLM 0.19.
    Raises ConfigError if there are more stages than layers.
    """
    if (reason := why_not_divisible(layout.name, config.L, num_stages)) is not None:
        raise ConfigError(reason)
    each, rest = divmod(config.L, num_stages)
    return tuple(each + (num_stages - 1 - rest <= i < num_stages - 1) for i in range(num_stages))


def why_not_divisible(name: str, num_layers: int, num_stages: int) -> str | None:
    """The reason why the model or graph `name` cannot be divided into this number of stages, or None."""
    if num_stages <= num_layers:
        return None
    return (
        f"pipeline_parallel_size={num_stages} is more than the {num_layers} layers of {name}; "
        "use at most one stage per layer"
    )


def parse_partition(text: str | None) -> tuple[int, ...] | None:
    """Numbers of layers such as "20,10". Raises ConfigError for other texts."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except (ValueError, AttributeError):
        raise ConfigError(f"pp_layer_partition must be numbers of layers such as '20,10', got {text!r}") from None


def weight_reads(layout: ModelLayout, config: Any) -> WeightReads:
    """The weights that a step of the model reads, from its kernel graph."""
    phase = "decode" if "decode" in layout.phases else layout.phases[0]
    graph = expand(whole_block_graph(layout, config, phase), layout, config)
    before, after, layers = set[str](), set[str](), [set[str]() for _ in range(config.L)]
    has_layers_begun = False
    for node in graph.topological_sort():
        has_layers_begun |= node.layer_id is not None
        read = (after if has_layers_begun else before) if node.layer_id is None else layers[node.layer_id]
        if node.op_type.name != "EMBEDDING":
            read.update(ref.name for ref in node.inputs if ref.name in graph.weights)
    return WeightReads(_bytes(graph, before), tuple(_bytes(graph, names) for names in layers), _bytes(graph, after))


def balanced_sizes(reads: WeightReads, num_stages: int) -> tuple[int, ...]:
    """The numbers of layers of which the largest stage reads the fewest bytes, with the least sum of squares of those.

    Every stage has a layer. Requires at least as many layers as stages.
    """
    costs = reads.by_layer
    limit = _smallest_limit(costs, num_stages)
    ends = [0, *accumulate(costs)]
    # The least sum of squares of the stages up to a layer, and their numbers of layers.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(num_stages):
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start, (squares, sizes) in best.items():
            for end in range(start + 1, len(ends)):
                cost = ends[end] - ends[start]
                if cost > limit:
                    break
                candidate = squares + cost * cost, (*sizes, end - start)
                found[end] = min(found.get(end, candidate), candidate)
        best = found
    return best[len(costs)][1]


def _smallest_limit(costs: Sequence[int], num_stages: int) -> int:
    """The smallest largest cost of a stage, by bisection: filling stages in turn needs the fewest for a limit."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _num_filled(costs, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def _num_filled(costs: Sequence[int], limit: int) -> int:
    """The number of stages if each takes layers up to the limit."""
    count, filled = 1, 0
    for cost in costs:
        filled += cost
        if filled > limit:
            count, filled = count + 1, cost
    return count


def _check_partition(partition: Sequence[int], name: str, num_layers: int, num_stages: int) -> None:
    shown = ",".join(map(str, partition))
    if len(partition) != num_stages:
        raise ConfigError(
            f"pp_layer_partition={shown} must have a number for each of pipeline_parallel_size={num_stages} stages"
        )
    if min(partition) < 1 or sum(partition) != num_layers:
        raise ConfigError(
            f"pp_layer_partition={shown} must be positive, and add up to the {num_layers} layers of {name}"
        )


def _bytes(graph: ExecutionGraph, names: set[str]) -> int:
    total = 0
    for name in names:
        size = product(graph.weights[name].shape)
        assert isinstance(size, int), f"the size of {name} is not known"
        total += size * DTYPES[graph.weights[name].dtype]
    return total
