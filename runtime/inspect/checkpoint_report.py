"""What can be said of a checkpoint from its config alone: sizes, memory, parallel degrees, and whether names fit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.model.checkpoint import check_checkpoint, missing_prefix
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.weights import share_shape
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand

DEGREES = (1, 2, 4, 8)
MAX_LAYERS = 2048
FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True, slots=True)
class Degree:
    """A degree of tensor parallelism: the parameters that rank 0 holds, or what stands against the degree."""

    tp: int
    parameters: int | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of a model whose weights nobody has seen. Tied weights count once; KV is the cache of one token.

    `index` are the differences from an index file, empty if there are none, None if no index was given.
    """

    layout: str
    spec: str
    config: str
    tensors: int
    parameters: int
    bytes: Mapping[str, int]
    kv_bytes_per_token: Mapping[str, int]
    degrees: tuple[Degree, ...]
    index: tuple[str, ...] | None
    index_tensors: int | None


def lint_model(
    layout: ModelLayout, config: Any, path: str, degrees: Iterable[int], names: Iterable[str] | None
) -> Report:
    """Everything known from the config, and, with the names of an index, whether these are the layout's tensors.

    Raises ConfigError for a config whose weights cannot be, such as a stack without end.
    """
    if config.L > MAX_LAYERS:
        raise ConfigError(f"{path}: {config.L} layers are more than any model has; {MAX_LAYERS} can be checked")
    tensors, parameters = _counts(layout, config)
    values = _cached_values(layout, config)
    found = None if names is None else _renamed(layout, list(names))
    return Report(
        layout=layout.name,
        spec=layout.spec,
        config=path,
        tensors=tensors,
        parameters=parameters,
        bytes={dtype: parameters * DTYPES[dtype] for dtype in FLOATS},
        kv_bytes_per_token={dtype: values * DTYPES[dtype] for dtype in FLOATS},
        degrees=tuple(_degree(layout, config, tp) for tp in degrees),
        index=None if found is None else tuple(check_checkpoint(layout, config, found)),
        index_tensors=None if found is None else len(found),
    )


def _renamed(layout: ModelLayout, names: list[str]) -> dict[str, None]:
    prefix = missing_prefix(layout.prefix, names)
    return {prefix + name: None for name in names}


def _counts(layout: ModelLayout, config: Any) -> tuple[int, int]:
    """How many tensors a checkpoint of the layout has, and how many parameters are in them."""
    names: set[str] = set()
    parameters = 0
    for weight in layout.weights(config):
        if weight.tied_to is None:
            names.update(part.name for part in weight.parts)
            parameters += weight.num_elements
    return len(names), parameters


def _kernel_graph(layout: ModelLayout, config: Any, tp: int) -> ExecutionGraph:
    """The kernel graph of a rank's prefill step, with symbolic sizes of the step."""
    block_graph = build_block_graph(layout, config, "prefill", ParallelConfig(tensor_parallel_size=tp))
    return expand(block_graph, layout, block_graph.model_config)


def _cached_values(layout: ModelLayout, config: Any) -> int:
    """How many values the caches keep of one token, in all layers that attend to earlier ones."""
    layers = [name for name in _kernel_graph(layout, config, 1).inputs if name.endswith(".k_cache")]
    return len(layers) * layout.cache(config).num_elements


def _degree(layout: ModelLayout, config: Any, tp: int) -> Degree:
    """Whether the sizes divide, and the ranks' graphs want just the shapes that their shares have."""
    try:
        graph = _kernel_graph(layout, config, tp)
        shapes = {weight.name: share_shape(weight, tp) for weight in layout.weights(config)}
    except ConfigError as error:
        return Degree(tp, None, str(error))
    for name, ref in graph.weights.items():
        if ref.shape != shapes[name]:
            return Degree(tp, None, f"the graph reads {name} as {list(ref.shape)}, a rank holds {list(shapes[name])}")
    held = sum(prod(shapes[weight.name]) for weight in layout.weights(config) if weight.tied_to is None)
    return Degree(tp, held)
