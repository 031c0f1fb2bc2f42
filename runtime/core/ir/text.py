"""Text form of execution graphs: one line per node, compact and stable for snapshots, parsed back without loss.

    graph decode_4 level=kernel stage=decode layers=2
    input x: f32[T, 64]
    weight layers.0.w: f32[128, 64]
    L0.y: f32[T, 128] = linear(x, layers.0.w) {scale=0.5}  @layer=0 block=ffn origins=[L0.ffn]
    return L0.y

A name that is not a dotted identifier is written as a JSON string. An op node is written with its op's name, a plain
node with its op type in capitals. The first mention of a value includes its type, and `@1` if it is on device 1. Only
fields that differ from the defaults are written; dependencies that follow from names are omitted, as is `model_config`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from sageLLM.runtime.core.errors import IRError
from sageLLM.runtime.core.ir.dims import Expr
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.parse import KEYWORDS, parse_text

__all__ = ["parse_text", "to_text"]

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def to_text(graph: ExecutionGraph) -> str:
    """The graph as text, the inverse of `parse_text`. IRError for an op name that the form cannot express."""
    return "".join(f"{line}\n" for line in _Printer().lines(graph))


class _Printer:
    def __init__(self) -> None:
        self.known: dict[str, TensorRef] = {}
        self.producers: dict[str, str] = {}

    def lines(self, graph: ExecutionGraph) -> Iterator[str]:
        yield _header(graph)
        for word, table in (("input", graph.inputs), ("weight", graph.weights)):
            for name, ref in table.items():
                if name != ref.name:
                    raise IRError(f"{word} {name!r} is declared as {ref.name!r}")
                yield f"{word} {self._declared(ref)}"
        for node in graph.nodes.values():
            yield self._node(node)
        if graph.outputs:
            yield f"return {', '.join(map(self._ref, graph.outputs))}"
        yield from _members(graph)

    def _node(self, node: ExecutionNode) -> str:
        operands = ", ".join(map(self._ref, node.inputs))
        results = ", ".join(map(self._declared, node.outputs)) or "()"
        attrs = ", ".join(f"{_name(key)}={_value(value)}" for key, value in node.attrs.items())
        facts = " ".join(self._facts(node))
        self.producers.update((ref.name, node.node_id) for ref in node.outputs)
        tail = (f" {{{attrs}}}" if attrs else "") + (f"  @{facts}" if facts else "")
        return f"{results} = {_callee(node)}({operands}){tail}"

    def _facts(self, node: ExecutionNode) -> Iterator[str]:
        if not node.outputs or node.node_id != node.outputs[0].name:
            yield f"id={_name(node.node_id)}"
        if isinstance(node, OpNode) and node.op_type is not node.kind:
            yield f"type={_op_type(node)}"
        if node.layer_id is not None:
            yield f"layer={node.layer_id}"
        if node.block is not None:
            yield f"block={_name(node.block)}"
        if node.device_id:
            yield f"device={node.device_id}"
        if node.stream_id:
            yield f"stream={node.stream_id}"
        if node.estimated_time_us:
            yield f"time_us={float(node.estimated_time_us)!r}"
        if node.memory_bytes:
            yield f"bytes={node.memory_bytes}"
        if node.origins:
            yield f"origins={_names(node.origins)}"
        data = {self.producers[ref.name] for ref in node.inputs if ref.name in self.producers}
        # The parser derives data dependencies: `after` adds to them, `needs` replaces them in a graph that lacks some.
        if not data <= node.dependencies:
            yield f"needs={_names(sorted(node.dependencies))}"
        elif node.dependencies - data:
            yield f"after={_names(sorted(node.dependencies - data))}"
        if node.metadata:  # last, since JSON may contain any of the separators
            yield f"meta={json.dumps(node.metadata)}"

    def _ref(self, ref: TensorRef) -> str:
        """An operand: its name, with the type at the first mention and where it changed."""
        return _name(ref.name) if self.known.get(ref.name) == ref else self._declared(ref)

    def _declared(self, ref: TensorRef) -> str:
        self.known[ref.name] = ref
        device = f"@{ref.device_id}" if ref.device_id else ""
        return f"{_name(ref.name)}: {_name(ref.dtype)}[{', '.join(map(str, ref.shape))}]{device}"


def _header(graph: ExecutionGraph) -> str:
    stage = f" stage={graph.stage}" if graph.stage is not None else ""
    layers = f" layers={graph.num_layers}" if graph.num_layers else ""
    return f"graph {_name(graph.graph_id)} level={graph.level}{stage}{layers}"


def _members(graph: ExecutionGraph) -> Iterator[str]:
    """The membership sets that differ from those that `add_node` would derive."""
    nodes = graph.nodes.values()
    for word, members in (("prefill", graph.prefill_nodes), ("decode", graph.decode_nodes)):
        if members != {node.node_id for node in nodes if word in graph.phases_of(node)}:
            yield f"members {word} {_names(sorted(members))}"
    if graph.comm_nodes != {node.node_id for node in nodes if node.op_type.is_comm}:
        yield f"members comm {_names(sorted(graph.comm_nodes))}"


def _callee(node: ExecutionNode) -> str:
    if not isinstance(node, OpNode):
        return _op_type(node)
    if not _PLAIN_NAME.fullmatch(node.op) or node.op.isupper():
        raise IRError(f"op name {node.op!r}: expected an identifier that is not all capitals")
    return node.op


def _op_type(node: ExecutionNode) -> str:
    name = node.op_type.name
    if not _PLAIN_NAME.fullmatch(name) or not name.isupper():
        raise IRError(f"op type name {name!r}: expected an identifier in capitals")
    return name


def _name(name: str) -> str:
    is_plain = _PLAIN_NAME.fullmatch(name) and name not in KEYWORDS
    return name if is_plain else json.dumps(name)


def _names(names: Iterable[str]) -> str:
    return f"[{', '.join(map(_name, names))}]"


def _value(value: AttrValue) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, Expr):
        return f"`{value}`"
    return json.dumps(value) if isinstance(value, str) else repr(value)
