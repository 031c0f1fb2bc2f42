"""Nodes that join the rows of several values into one and split them again."""

from __future__ import annotations

from collections.abc import Sequence

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode

PART = "part"
"""Key of a node's metadata: the number of its micro-batch."""


def new_node(
    cls: type[OpNode], like: ExecutionNode, inputs: list[TensorRef], names: Sequence[str], **attrs: AttrValue
) -> OpNode:
    """An op node with the device, stream, layer and phase of another; TypeMismatch if the operands do not fit."""
    operands = {name: ref.type for name, ref in zip(cls.input_types, inputs, strict=False)}
    inference = cls.resolve(operands, attrs)
    types = zip(names, inference.outputs, strict=True)
    outputs = [TensorRef(name, type_.shape, type_.dtype, like.device_id) for name, type_ in types]
    node = cls(names[0], cls.kind, inputs, outputs, device_id=like.device_id, stream_id=like.stream_id)
    node.attrs, node.layer_id, node.block = inference.attrs, like.layer_id, like.block
    node.metadata = {key: like.metadata[key] for key in ("phase", PART) if key in like.metadata}
    return node


def join_rows(join: type[OpNode], like: ExecutionNode, refs: Sequence[TensorRef], name: str) -> list[OpNode]:
    """Nodes of the op `join`, which takes two values; the last one produces all rows, in order, as the value `name`."""
    nodes: list[OpNode] = []
    joined = refs[0]
    for i, ref in enumerate(refs[1:], start=1):
        is_last = i == len(refs) - 1
        nodes.append(new_node(join, like, [joined, ref], [name if is_last else f"{name}.{i}"]))
        joined = nodes[-1].outputs[0]
    return nodes


def split_rows(split: type[OpNode], like: ExecutionNode, ref: TensorRef, parts: Sequence[TensorRef]) -> list[OpNode]:
    """Nodes of the op `split`, which returns the first rows and the rest; together they produce `parts`, in order."""
    attr = next(iter(split.attr_types))
    nodes: list[OpNode] = []
    rest = ref
    for i, part in enumerate(parts[:-1]):
        is_last = i == len(parts) - 2
        names = [part.name, parts[-1].name if is_last else f"{ref.name}.rest{i + 1}"]
        count = part.shape[0]
        nodes.append(new_node(split, like, [rest], names, **{attr: count}))
        rest = nodes[-1].outputs[1]
    return nodes


def free_name(graph: ExecutionGraph, name: str) -> str:
    """The name, lengthened until no value and no node of the graph has it."""
    while graph.producer(name) or name in graph.nodes or name in graph.inputs or name in graph.weights:
        name += "_"
    return name
