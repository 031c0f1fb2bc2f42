"""Rewrite rules, their results, and the helpers that generated rules call.

A rule is a function of a graph and a node: it returns a `Rewrite` (the nodes to replace and their replacement), a
`NearMiss` (a partial match, with the reason why it went no further), or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from sageLLM.runtime.core.ir.dims import Dim, Expr
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode

FLOATS = ("f16", "bf16", "f32", "f64")


@dataclass(frozen=True, slots=True)
class NewCall:
    """An op that a rewrite inserts: its operands, its attributes, and its outputs in order.

    An output that is a value of the pattern replaces that value. A text names a new value, to which the operands of
    later calls may refer; in the graph it receives a unique name.
    """

    op: type[OpNode]
    inputs: Mapping[str, TensorRef | str | None]
    attrs: Mapping[str, AttrValue]
    outputs: tuple[TensorRef | str, ...]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The result of a match: the `matched` nodes, the anchor last, are replaced by `calls`.

    `kept` are the values of the matched nodes that other nodes may still read, since a call produces them again, or
    since they are `same` as another value, which consumers then read: (value of a matched node, other value).
    """

    matched: tuple[OpNode, ...]
    calls: tuple[NewCall, ...]
    kept: tuple[TensorRef, ...]
    same: tuple[tuple[TensorRef, TensorRef], ...] = ()


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A rule that did not fire: how many of its nodes matched, and the reason, such as another op than expected.

    If all nodes matched, the rewrite was refused by a condition or because the graph lacks a valid position for it.
    """

    num_matched: int
    reason: str


RuleFunction: TypeAlias = "Callable[[ExecutionGraph, OpNode], Rewrite | NearMiss | None]"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rewrite rule: `anchor` is the op of the pattern's last node, where matching starts.

    Rules are tried by falling benefit. A bounded rule fires at most `bounded` times in one graph.
    """

    name: str
    anchor: type[OpNode]
    apply: RuleFunction
    num_nodes: int
    benefit: int = 1
    bounded: int | None = None


Consumer = TypeVar("Consumer", bound=OpNode)


def consumer_of(graph: ExecutionGraph, value: TensorRef, op: type[Consumer]) -> Consumer | None:
    """The only node of an op that reads a value; None for several, since a match must not depend on a choice."""
    consumers = [node for node in graph.users(value) if isinstance(node, op)]
    return consumers[0] if len(consumers) == 1 else None


def describe_producer(node: ExecutionNode | None) -> str:
    """The producer of a value in the reason of a near miss: `embedding`, `cast(f32->bf16)`, or `outside`."""
    if node is None:
        return "outside"
    kinds = [refs[0].dtype for refs in (node.inputs, node.outputs) if refs and refs[0].dtype in FLOATS]
    return f"{node.op}({kinds[0]}->{kinds[1]})" if len(set(kinds)) == 2 else node.op


def describe_consumers(graph: ExecutionGraph, value: TensorRef) -> str:
    """The consumers of a value in the reason of a near miss: `add, rope`, or `nothing`."""
    return ", ".join(sorted(user.op for user in graph.users(value))) or "nothing"


def has_default(node: OpNode, attr: str) -> bool:
    """Whether an attribute has its declared default, which may depend on the operands."""
    others = {name: value for name, value in node.attrs.items() if name != attr}
    types = {name: ref.type for name, ref in zip(node.operands, node.inputs, strict=True)}
    return node.attrs.get(attr) in (None, node.resolve(types, others).attrs[attr])


def dim_of(attr: AttrValue) -> Dim:
    """The value of an attr that is a dim."""
    assert isinstance(attr, int | Expr), f"expected a dim, got {attr!r}"
    return attr


def is_known(value: TensorRef, index: int | None = None) -> bool:
    """Whether the sizes of a value, or the one at an index, are numbers."""
    sizes = value.shape if index is None else value.shape[index : index + 1]
    return all(isinstance(size, int) for size in sizes) and (index is None or bool(sizes))


def size_of(value: TensorRef, index: int) -> int:
    """The size of a dim that `is_known`."""
    size = value.shape[index]
    assert isinstance(size, int), f"dim {index} of {value} is symbolic"
    return size
