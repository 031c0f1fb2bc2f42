"""The parts of an execution graph: op types, tensor references, plain nodes, and the base of generated op classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self, TypeAlias

from sageLLM.runtime.core.ir.dims import Dim, Expr, product
from sageLLM.runtime.core.ir.types import DTYPES, TensorType

AttrValue: TypeAlias = "bool | int | float | str | Expr | tuple[AttrValue, ...] | None"


class OpTypeBase(Enum):
    """What kind of work a node does; the members are generated from the specs."""

    @property
    def is_comm(self) -> bool:
        """Whether devices talk to each other."""
        return self.name.startswith("COMM_")

    @property
    def is_kv(self) -> bool:
        """Whether keys and values move to, from or between caches."""
        return self.name.startswith("KV_")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A named value of a graph: its shape (sizes or formulas), element type, and the device that holds it."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    device_id: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.type}"

    @property
    def type(self) -> TensorType:
        return TensorType(self.dtype, self.shape)

    @property
    def num_elements(self) -> int:
        """Elements in the tensor; ValueError while a size is symbolic."""
        count = product(self.shape)
        if not isinstance(count, int):
            raise ValueError(f"{self} has no number yet: bind {count}")
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements; ValueError while a size is symbolic or for an unknown dtype."""
        if self.dtype not in DTYPES:
            raise ValueError(f"{self} has an unknown element type, want one of {', '.join(DTYPES)}")
        return self.num_elements * DTYPES[self.dtype]


@dataclass
class ExecutionNode:
    """One step of a graph: a block, a kernel, a transfer or a cache operation.

    `estimated_time_us` is in microseconds, `memory_bytes` counts the bytes of the outputs. Nodes of one
    (device_id, stream_id) run one after another. `dependencies` are ids of nodes that must finish first.
    `metadata` holds plain JSON data. `origins` are the ids of the nodes that a rewrite or an expansion made it from.
    """

    node_id: str
    op_type: OpTypeBase
    inputs: list[TensorRef]
    outputs: list[TensorRef]
    dependencies: set[str] = field(default_factory=set)
    device_id: int = 0
    stream_id: int = 0
    estimated_time_us: float = 0.0
    memory_bytes: int = 0
    layer_id: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, AttrValue] = field(default_factory=dict)
    block: str | None = None
    origins: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        """The op's name: for a plain node metadata["op"], or else its op type in lower case."""
        return str(self.metadata.get("op", self.op_type.name.lower()))

    def copy(self) -> Self:
        """A node whose lists, sets and metadata are its own."""
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new.inputs, new.outputs, new.dependencies = list(self.inputs), list(self.outputs), set(self.dependencies)
        new.attrs, new.metadata = dict(self.attrs), {key: _copy_plain(value) for key, value in self.metadata.items()}
        return new


def _copy_plain(data: Any) -> Any:
    """A copy of plain JSON data, which holds nothing but lists and dicts that could change."""
    if isinstance(data, list):
        return [_copy_plain(item) for item in data]
    return {key: _copy_plain(item) for key, item in data.items()} if isinstance(data, dict) else data
