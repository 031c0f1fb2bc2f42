"""Report on a checkpoint from its config alone: sizes, memory, parallel degrees, and the match of tensor names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.types import DTYPES
from sageLLM.runtime.core.model.checkpoint import Shape, check_checkpoint
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.core.model.weights import padded_vocab, share_shape
from sageLLM.runtime.execution_graph.builder import ParallelConfig, build_block_graph
from sageLLM.runtime.execution_graph.expand import expand

DEGREES = (1, 2, 4, 8)
MAX_LAYERS = 2048
FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True, slots=True)
class Degree:
    """A degree of tensor parallelism: the number of parameters on rank 0, or the reason why the degree is invalid.

    `padded_vocab` is the number of rows of the token tables over all ranks, if it is not that of the tokens.
    """

    tp: int
    parameters: int | None
    problem: str | None = None
    padded_vocab: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of a model without its weights. Tied weights count once; KV is the cache of one token.

    `index` lists the differences from the checkpoint's tensors; it is empty for a match and None if they are unknown.
    `quantization` is the reason to refuse a quantised checkpoint; the counts are then those of the unquantised model.
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
    quantization: str | None = None


def lint_model(
    layout: ModelLayout, config: Any, path: str, degrees: Iterable[int], shapes: Mapping[str, Shape | None] | None
) -> Report:
    """The report on a config, and on the checkpoint's tensors if they are known; a shape of None is unknown.

    Raises ConfigError for a config with impossible weights, such as an unbounded stack.
    """
    if config.L > MAX_LAYERS:
        raise ConfigError(f"{path}: expected at most {MAX_LAYERS} layers, got {config.L}")
    tensors, parameters = _counts(layout, config)
    values = _cached_values(layout, config)
    return Report(
        layout=layout.name,
        spec=layout.spec,
        config=path,
        tensors=tensors,
        parameters=parameters,
        bytes={dtype: parameters * DTYPES[dtype] for dtype in FLOATS},
        kv_bytes_per_token={dtype: values * DTYPES[dtype] for dtype in FLOATS},
        degrees=tuple(_degree(layout, config, tp) for tp in degrees),
        index=None if shapes is None else tuple(check_checkpoint(layout, config, shapes)),
        index_tensors=None if shapes is None else len(shapes),
    )


def _counts(layout: ModelLayout, config: Any) -> tuple[int, int]:
    """The numbers of tensors and of parameters in a checkpoint of the layout."""
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
    """The number of cached values per token, over all layers with a KV cache."""
    layers = [name for name in _kernel_graph(layout, config, 1).inputs if name.endswith(".k_cache")]
    return len(layers) * layout.cache(config).num_elements


def _degree(layout: ModelLayout, config: Any, tp: int) -> Degree:
    """A degree, checked twice: the sizes divide, and the shapes in a rank's graph are those of its shares."""
    try:
        graph = _kernel_graph(layout, config, tp)
        shapes = {weight.name: share_shape(weight, tp) for weight in layout.weights(config)}
    except ConfigError as error:
        return Degree(tp, None, str(error))
    for name, ref in graph.weights.items():
        if ref.shape != shapes[name]:
            return Degree(tp, None, f"{name}: the graph expects {list(ref.shape)}, a rank has {list(shapes[name])}")
    parameters = sum(prod(shapes[weight.name]) for weight in layout.weights(config) if weight.tied_to is None)
    padded = padded_vocab(config.V, tp)
    is_sharded = any(weight.shard is not None and weight.shard.kind == "vocab" for weight in layout.weights(config))
    return Degree(tp, parameters, padded_vocab=padded if is_sharded and padded != config.V else None)
