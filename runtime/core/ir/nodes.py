"""The parts of an execution graph: op types, tensor references and nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self, TypeAlias

from sageLLM.runtime.core.ir.dims import Dim, Expr, product
from sageLLM.runtime.core.ir.types import DTYPES, TensorType

AttrValue: TypeAlias = "bool | int | float | str | Expr | tuple[AttrValue, ...] | None"


class OpTypeBase(Enum):
    """The kind of work of a node; the members are generated from the specs."""

    @property
    def is_comm(self) -> bool:
        """Whether the node communicates between devices."""
        return self.name.startswith("COMM_")

    @property
    def is_kv(self) -> bool:
        """Whether the node moves keys and values to, from or between caches."""
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
    def is_bound(self) -> bool:
        """Whether all sizes are numbers."""
        return all(isinstance(size, int) for size in self.shape)

    @property
    def num_elements(self) -> int:
        """Elements in the tensor; ValueError while a size is symbolic."""
        count = product(self.shape)
        if not isinstance(count, int):
            raise ValueError(f"{self}: the number of elements is symbolic; bind {count}")
        return count

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements; ValueError while a size is symbolic or for an unknown dtype."""
        if self.dtype not in DTYPES:
            raise ValueError(f"{self}: unknown element type, expected one of {', '.join(DTYPES)}")
        return self.num_elements * DTYPES[self.dtype]


@dataclass
class ExecutionNode:
    """One step of a graph: a block, a kernel, a transfer or a cache operation.

    `estimated_time_us` is in microseconds, `memory_bytes` counts the bytes of the outputs. Nodes of one
    (device_id, stream_id) run one after another. `dependencies` are ids of nodes that must finish first.
    `metadata` contains plain JSON data. `origins` are the ids of the nodes that a rewrite or an expansion replaced
    by this one.
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
        """The op's name: for a plain node metadata["op"], by default its op type in lower case."""
        return str(self.metadata.get("op", self.op_type.name.lower()))

    def copy(self) -> Self:
        """A copy that shares no list, set or metadata with this node."""
        # Bypasses __init__: passes copy whole graphs, and dataclasses.replace takes twice as long.
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        new.inputs, new.outputs, new.dependencies = list(self.inputs), list(self.outputs), set(self.dependencies)
        new.attrs, new.metadata = dict(self.attrs), {key: _copy_plain(value) for key, value in self.metadata.items()}
        return new


def _copy_plain(data: Any) -> Any:
    """A copy of plain JSON data, in which only lists and dicts are mutable."""
    if isinstance(data, list):
        return [_copy_plain(item) for item in data]
    return {key: _copy_plain(item) for key, item in data.items()} if isinstance(data, dict) else data
