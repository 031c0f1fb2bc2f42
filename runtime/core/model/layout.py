"""Declaration of a model family in generated code: sizes, weights, blocks and the program that calls them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from sageLLM.runtime.core.errors import ConfigError
from sageLLM.runtime.core.ir.dims import Dim, dims
from sageLLM.runtime.core.ir.graph import Stage as Stage
from sageLLM.runtime.core.ir.nodes import AttrValue, OpTypeBase, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.types import DTYPES, TensorType
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.rope import RopeSpec
from sageLLM.runtime.core.model.weights import WeightSpec

T, B, Td, Tp, PG, BS, KV, KVd = dims("T B Td Tp PG BS KV KVd")


@dataclass(frozen=True, slots=True)
class AlibiSpec:
    """ALiBi slopes for all heads of the model, down to 2 ** -max_bias (Press et al., arXiv 2108.12409)."""

    heads: int
    max_bias: float


@dataclass(frozen=True, slots=True)
class KvShape:
    """The KV cache entry of one token in one layer: [heads, width] of the key and of the value.

    With `is_shared` the value is the leading part of the key and takes no extra memory, as in latent attention.
    """

    k: tuple[int, int]
    v: tuple[int, int]
    is_shared: bool = False

    @property
    def num_elements(self) -> int:
        return prod(self.k) + (0 if self.is_shared else prod(self.v))

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of an entry: [2, heads, width] if key and value have equal shapes."""
        if self.is_shared:
            return self.k
        return (2, *self.k) if self.k == self.v else (self.num_elements,)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The fields that every generated config has; further fields belong to the layout.

    Under tensor parallelism `tp` is the degree, `rank` this rank, and divided sizes are a rank's share. `ep` is `tp` if
    each rank has whole experts instead of a share of each, else 1.
    """

    H: int
    L: int
    Nq: int
    Nkv: int
    D: int
    V: int
    max_position: int
    rope: Mapping[str, RopeSpec] = field(default_factory=dict)
    """By the name of the tables, which is "" for a single pair."""
    alibi: AlibiSpec | None = None
    tp: int = 1
    rank: int = 0
    ep: int = 1
    read_keys: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """The first key of a config name -> the fallback that the config has instead."""

    def key(self, first: str) -> str:
        """The key of config.json from which a name with several keys was read, for messages."""
        return self.read_keys.get(first, first)

    @property
    def longest(self) -> int:
        """The length of the longest sequence. With tables per layer type, it is `max_position`."""
        return self.rope[""].longest if "" in self.rope else self.max_position


@dataclass(frozen=True, slots=True)
class KvNodes:
    """The ops around a block that uses the KV cache: load, store, and the join of its halves in a hybrid step.

    `shape(config)` is the cache entry of a token in a layer.
    """

    load: OpTypeBase
    store: OpTypeBase
    join: type[OpNode]
    shape: Callable[[Any], KvShape]


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a layer that is one node at block level.

    `body(g, config, stage, layer, *args)` emits its ops and returns its results. A block with `kv` lacks an op type
    for the hybrid stage, where it is a pair of its prefill and its decode node. `variant(config, layer)` is the layer
    condition on which the body depends: layers of one variant share the body. Without it all layers share one.
    """

    name: str
    op_type: Mapping[Stage, OpTypeBase]
    body: Callable[..., tuple[TensorRef, ...]]
    kv: KvNodes | None = None
    variant: Callable[[Any, int], Hashable] | None = None

    def variant_of(self, config: Any, layer: int) -> Hashable:
        """A key that is equal for layers with equal bodies."""
        return self.variant(config, layer) if self.variant is not None else None

    @property
    def uses_kv(self) -> bool:
        return self.kv is not None


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """A model family. `spec` names the spec entry, `tiny` is an HF config for tests.

    The text part of a model with images or sound is read from the section `root` of config.json, whose `model_type` is
    one of `model_types` if the architecture has text models of several kinds. `renamed` has, for a beginning of the
    tensor names, those that checkpoints have instead, in order of preference.

    `program` returns the values named in `returns`: logits and tokens, or embeddings. An embedding is computed from
    the value `hidden`, with a row per token (per sampled row in a layout that generates), or is the value `pooled`,
    with a row per sequence. A layout without a KV cache reads whole sequences at once: its only phase is prefill.
    """

    name: str
    spec: str
    architectures: tuple[str, ...]
    read_config: Callable[[HFConfig], Any]
    shard_config: Callable[[Any, int], Any]
    weights: Callable[[Any], Iterator[WeightSpec]]
    program: Callable[[GraphWriter, Any, Stage], list[TensorRef]]
    cache: Callable[[Any], KvShape]
    blocks: Mapping[str, Block]
    ignore: tuple[str, ...]
    tiny: Mapping[str, Any]
    root: str = ""
    model_types: tuple[str, ...] = ()
    prefix: str = ""
    outer_prefix: str = ""
    renamed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    returns: tuple[str, ...] = ("logits", "tokens")
    phases: tuple[Stage, ...] = ("prefill", "decode", "hybrid")
    hidden: str | None = None
    pooled: str | None = None

    @property
    def generates(self) -> bool:
        """Whether the program returns logits and tokens."""
        return self.pooled is None and self.hidden not in self.returns

    def in_root(self, keys: Mapping[str, Any]) -> Mapping[str, Any]:
        """A config.json with these keys of the text model."""
        for step in reversed(self.root.split(".") if self.root else ()):
            keys = {step: keys}
        return keys


def num_rows(stage: Stage) -> Dim:
    """The token rows of a step: T in prefill, B (one per sequence) in decode, Td + Tp in hybrid, decodes first."""
    return {"prefill": T, "decode": B, "hybrid": Td + Tp}[stage]


def call_block(
    g: GraphWriter, c: ModelSizes, block: Block, stage: Stage, layer: int, *args: TensorRef, **results: int
) -> tuple[TensorRef, ...]:
    """Writes the block-level nodes of one call. `results` maps the name of each result to its row width."""
    call = {"call": f"L{layer}.{block.name}"}
    if block.kv is None:
        types = [TensorType(g.dtype, (num_rows(stage), width)) for width in results.values()]
        return g.call_block(block.name, block.op_type[stage], args, tuple(results), types, metadata=call)
    shape = block.kv.shape(c)
    caches = [
        g.input(f"layers.{layer}.{name}", g.dtype, PG, BS, *sizes)
        for name, sizes in (("k_cache", shape.k), ("v_cache", shape.v))
    ]
    calls = _KvCall(g, shape, block, block.kv, args, caches, call)
    if stage == "prefill":
        return calls.prefill(results, T)
    if stage == "decode":
        return calls.decode(results, B, KV)
    return calls.hybrid(results)


@dataclass(frozen=True, slots=True)
class _KvCall:
    """One call of a block that reads and writes the KV cache."""

    g: GraphWriter
    shape: KvShape
    block: Block
    kv: KvNodes
    args: tuple[TensorRef, ...]
    caches: list[TensorRef]
    call: dict[str, str]

    def prefill(self, results: Mapping[str, int], rows: Dim) -> tuple[TensorRef, ...]:
        """The attention node, which returns keys and values kv_new [rows, ...], and the node that stores them."""
        types = [TensorType(self.g.dtype, (rows, width)) for width in results.values()]
        types.append(TensorType(self.g.dtype, (rows, *self.shape.row)))
        kind = self.block.op_type["prefill"]
        *outputs, kv_new = self.g.call_block(
            self.block.name, kind, self.args, (*results, "kv_new"), types, metadata=self.call
        )
        metadata = {"op": "kv_store", "tier": "device", **self.call}
        sources, moved = [kv_new, *self.caches], self._moved(rows)
        self.g.call_block(self.block.name, self.kv.store, sources, (), (), moved, node_id="kv_store", metadata=metadata)
        return tuple(outputs)

    def decode(self, results: Mapping[str, int], rows: Dim, keys: Dim) -> tuple[TensorRef, ...]:
        """The node that loads keys and values kv [keys, ...], and the attention node that reads them."""
        metadata = {"op": "kv_load", "tier": "device", **self.call}
        kv_type = TensorType(self.g.dtype, (keys, *self.shape.row))
        loaded = self.g.call_block(
            self.block.name,
            self.kv.load,
            self.caches,
            ("kv",),
            (kv_type,),
            self._moved(keys),
            node_id="kv_load",
            metadata=metadata,
        )
        types = [TensorType(self.g.dtype, (rows, width)) for width in results.values()]
        kind = self.block.op_type["decode"]
        return self.g.call_block(
            self.block.name, kind, (*self.args, *loaded), tuple(results), types, metadata=self.call
        )

    def _moved(self, tokens: Dim) -> dict[str, AttrValue]:
        """The bytes read and written to move the keys and values of `tokens` tokens."""
        return {"bytes": tokens * (2 * self.shape.num_elements * DTYPES[self.g.dtype])}

    def hybrid(self, results: Mapping[str, int]) -> tuple[TensorRef, ...]:
        """Both nodes on the same rows, of which the decode node uses the first Td, and the join of their results."""
        # Decode first, as its rows come first in the batch.
        decoded = self.decode({f"{name}_decode": width for name, width in results.items()}, Td, KVd)
        prefilled = self.prefill({f"{name}_prefill": width for name, width in results.items()}, Tp)
        return tuple(self._join(name, a, b) for name, a, b in zip(results, decoded, prefilled, strict=True))

    def _join(self, name: str, decoded: TensorRef, prefilled: TensorRef) -> TensorRef:
        first, second = self.kv.join.input_types
        (joined,) = self.g.emit(self.kv.join, {first: decoded, second: prefilled}, {}, (name,))
        node = self.g.graph.producer(joined)
        assert node is not None, "an emitted value has a producer"
        node.metadata.update(self.call)
        node.block = self.block.name
        return joined


def divided(name: str, size: int, tp: int) -> int:
    """A rank's share of a size; ConfigError if `tp` does not divide it."""
    if size % tp:
        raise ConfigError(f"tensor_parallel_size={tp} does not divide {name}={size}; use a divisor of {size}")
    return size // tp


def divided_heads(name: str, size: int, tp: int) -> int:
    """A rank's key heads: its share, or a copy of one if there are fewer heads than ranks."""
    return 1 if size < tp and tp % size == 0 else divided(name, size, tp)
