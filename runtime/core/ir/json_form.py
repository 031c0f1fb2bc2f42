"""JSON form of execution graphs for other programs: the content of the text form, also without loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sageLLM.runtime.core.errors import IRError, ParseError
from sageLLM.runtime.core.ir.dims import Dim, Expr, parse_dim
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, OpTypeBase, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode


def to_json(graph: ExecutionGraph, *, indent: int | None = None) -> str:
    """The graph as JSON text: sizes are ints or formulas in strings, sets are sorted lists."""
    return json.dumps(graph_data(graph), indent=indent)


def from_json(text: str, op_types: type[OpTypeBase], ops: Mapping[str, type[OpNode]]) -> ExecutionGraph:
    """The graph of a JSON text. ParseError if the text is not JSON, IRError if it is not a graph's."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ParseError(error.msg, error.lineno, error.colno) from None
    try:
        return _graph(data, op_types, ops)
    except (KeyError, TypeError, AttributeError) as error:
        raise IRError(f"expected the JSON form of a graph: {type(error).__name__} {error}") from None


def graph_data(graph: ExecutionGraph) -> dict[str, Any]:
    """The graph as plain data."""
    return {
        "graph_id": graph.graph_id,
        "level": graph.level,
        "stage": graph.stage,
        "num_layers": graph.num_layers,
        "inputs": [_ref_data(ref) for ref in graph.inputs.values()],
        "weights": [_ref_data(ref) for ref in graph.weights.values()],
        "nodes": [node_data(node) for node in graph.nodes.values()],
        "outputs": [_ref_data(ref) for ref in graph.outputs],
        "prefill_nodes": sorted(graph.prefill_nodes),
        "decode_nodes": sorted(graph.decode_nodes),
        "comm_nodes": sorted(graph.comm_nodes),
    }


def node_data(node: ExecutionNode) -> dict[str, Any]:
    """A node as plain data; `op` is set for op nodes only."""
    return {
        "id": node.node_id,
        "op": node.op if isinstance(node, OpNode) else None,
        "op_type": node.op_type.name,
        "inputs": [_ref_data(ref) for ref in node.inputs],
        "outputs": [_ref_data(ref) for ref in node.outputs],
        "dependencies": sorted(node.dependencies),
        "device_id": node.device_id,
        "stream_id": node.stream_id,
        "estimated_time_us": _attr_data(node.estimated_time_us),
        "memory_bytes": node.memory_bytes,
        "layer_id": node.layer_id,
        "metadata": node.metadata,
        "attrs": {name: _attr_data(value) for name, value in node.attrs.items()},
        "block": node.block,
        "origins": list(node.origins),
    }


def _ref_data(ref: TensorRef) -> dict[str, Any]:
    return {
        "name": ref.name,
        "dtype": ref.dtype,
        "shape": [_dim_data(d) for d in ref.shape],
        "device_id": ref.device_id,
    }


def _dim_data(dim: Dim) -> int | str:
    return dim if isinstance(dim, int) else str(dim)


def _attr_data(value: AttrValue) -> Any:
    """An attribute; values that JSON lacks (formulas, tuples, infinite floats) become objects with one key."""
    if isinstance(value, Expr):
        return {"dim": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_attr_data(item) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _attr(data: Any) -> AttrValue:
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    ((kind, value),) = data.items()
    if kind == "dim":
        return parse_dim(value)
    return tuple(map(_attr, value)) if kind == "tuple" else float(value)


def _graph(data: Mapping[str, Any], op_types: type[OpTypeBase], ops: Mapping[str, type[OpNode]]) -> ExecutionGraph:
    nodes = [_node(item, op_types, ops) for item in data["nodes"]]
    return ExecutionGraph(
        data["graph_id"],
        nodes={node.node_id: node for node in nodes},
        prefill_nodes=set(data["prefill_nodes"]),
        decode_nodes=set(data["decode_nodes"]),
        comm_nodes=set(data["comm_nodes"]),
        num_layers=data["num_layers"],
        level=data["level"],
        stage=data["stage"],
        inputs={ref.name: ref for ref in map(_ref, data["inputs"])},
        weights={ref.name: ref for ref in map(_ref, data["weights"])},
        outputs=[_ref(item) for item in data["outputs"]],
    )


def _node(data: Mapping[str, Any], op_types: type[OpTypeBase], ops: Mapping[str, type[OpNode]]) -> ExecutionNode:
    cls = ExecutionNode if data["op"] is None else ops[data["op"]]
    time_us = _attr(data["estimated_time_us"])
    return cls(
        node_id=data["id"],
        op_type=op_types[data["op_type"]],
        inputs=[_ref(item) for item in data["inputs"]],
        outputs=[_ref(item) for item in data["outputs"]],
        dependencies=set(data["dependencies"]),
        device_id=data["device_id"],
        stream_id=data["stream_id"],
        estimated_time_us=time_us if isinstance(time_us, (int, float)) else 0.0,
        memory_bytes=data["memory_bytes"],
        layer_id=data["layer_id"],
        metadata=data["metadata"],
        attrs={name: _attr(value) for name, value in data["attrs"].items()},
        block=data["block"],
        origins=tuple(data["origins"]),
    )


def _ref(data: Mapping[str, Any]) -> TensorRef:
    shape = tuple(size if isinstance(size, int) else parse_dim(size) for size in data["shape"])
    return TensorRef(data["name"], shape, data["dtype"], data["device_id"])
