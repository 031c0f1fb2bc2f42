"""Puts what a rule wants into a graph, or says why that cannot be."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TypeAlias

from sageLLM.runtime.core.errors import IRError, TypeMismatch
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Inference, InferKey, OpNode, infer_key
from sageLLM.runtime.core.ir.verify import same_memory
from sageLLM.runtime.core.rewrite.rules import NearMiss, NewCall, Rewrite

Memo: TypeAlias = "MutableMapping[InferKey, Inference]"


def apply_rewrite(
    graph: ExecutionGraph, rewrite: Rewrite, position: Mapping[str, int], memo: Memo | None = None
) -> list[ExecutionNode] | NearMiss:
    """Puts the calls in the place of the matched nodes, in this graph, and gives the new nodes; or why that cannot be.

    Refused are values that others still read, types that do not fit the new ops, and a place that does not exist: the
    new nodes would have to stand behind something that itself waits for a matched node.
    """
    if (reason := _why_not_replaceable(graph, rewrite, position)) is not None:
        return NearMiss(len(rewrite.matched), reason)
    try:
        nodes = _new_nodes(graph, rewrite, memo if memo is not None else {})
    except TypeMismatch as error:
        return NearMiss(len(rewrite.matched), str(error))
    try:
        graph.replace(rewrite.matched, nodes)
    except IRError as error:
        return NearMiss(len(rewrite.matched), str(error))
    return nodes


def _why_not_replaceable(graph: ExecutionGraph, rewrite: Rewrite, position: Mapping[str, int]) -> str | None:
    matched = {node.node_id for node in rewrite.matched}
    kept = {ref.name for ref in rewrite.kept}
    returned = {ref.name for ref in graph.outputs}
    for node in rewrite.matched:
        for ref in node.outputs:
            others = [user.node_id for user in graph.users(ref) if user.node_id not in matched]
            if ref.name not in kept and (others or ref.name in returned):
                return f"{ref.name} is also read by {others[0] if others else 'the caller'}"
    if (lost := _lost_operand(rewrite)) is not None:
        return f"the replacement reads {lost}, which it takes away"
    return _why_no_place(graph, rewrite, matched, position) or _why_not_overwritable(graph, rewrite, matched, position)


def _why_not_overwritable(
    graph: ExecutionGraph, rewrite: Rewrite, matched: set[str], position: Mapping[str, int]
) -> str | None:
    """Whether a new op that works in place would destroy what is wanted afterwards."""
    returned = {ref.name for ref in graph.outputs}
    for call in rewrite.calls:
        for operand in call.op.inplace.values():
            ref = call.inputs.get(operand)
            for name in same_memory(graph, ref.name) if isinstance(ref, TensorRef) else ():
                if name in graph.weights or name in returned:
                    what = "a weight" if name in graph.weights else "returned"
                    return f"{call.op.op} overwrites {name}, which is {what}"
                for reader in graph.users(name):
                    if reader.node_id not in matched and not _runs_before(graph, reader, matched, position):
                        return f"{call.op.op} overwrites {name}, which {reader.node_id} may read later"
    return None


def _runs_before(graph: ExecutionGraph, node: ExecutionNode, matched: set[str], position: Mapping[str, int]) -> bool:
    """Whether a matched node waits for the node, or the node is a view, which reads nothing itself."""
    if isinstance(node, OpNode) and node.is_view:
        return True
    first = position.get(node.node_id, 0)
    pending = [d for node_id in matched for d in graph.nodes[node_id].dependencies if d not in matched]
    seen: set[str] = set()
    while pending:
        node_id = pending.pop()
        if node_id == node.node_id:
            return True
        if node_id not in seen and position.get(node_id, first) > first:
            seen.add(node_id)
            pending += graph.nodes[node_id].dependencies
    return False


def _lost_operand(rewrite: Rewrite) -> str | None:
    """A value of the pattern that a new op reads before one has given it again."""
    gone = {ref.name for node in rewrite.matched for ref in node.outputs}
    for call in rewrite.calls:
        for ref in call.inputs.values():
            if isinstance(ref, TensorRef) and ref.name in gone:
                return ref.name
        gone -= {wanted if isinstance(wanted, str) else wanted.name for wanted in call.outputs}
    return None


def _why_no_place(
    graph: ExecutionGraph, rewrite: Rewrite, matched: set[str], position: Mapping[str, int]
) -> str | None:
    """Whether an operand from outside waits for a matched node: then the replacement would wait for itself."""
    first = min(position.get(node_id, 0) for node_id in matched)
    pending = [d for node in rewrite.matched for d in node.dependencies if d not in matched]
    seen: set[str] = set()
    while pending:
        node_id = pending.pop()
        if node_id in matched:
            return "an operand waits for a value of the pattern itself"
        if node_id not in seen and position.get(node_id, first) >= first:  # what stands before cannot wait for it
            seen.add(node_id)
            pending += graph.nodes[node_id].dependencies
    return None


def _new_nodes(graph: ExecutionGraph, rewrite: Rewrite, memo: Memo) -> list[ExecutionNode]:
    anchor = rewrite.matched[-1]
    old = {ref.name: ref for node in rewrite.matched for ref in node.outputs}
    origins = tuple(dict.fromkeys(o for node in rewrite.matched for o in (node.origins or (node.node_id,))))
    made: dict[str, TensorRef] = {}
    nodes: list[ExecutionNode] = []
    for call in rewrite.calls:
        inputs = {name: _made(ref, made) for name, ref in call.inputs.items() if ref is not None}
        inference = _infer(call, inputs, memo)
        outputs = []
        for wanted, type_ in zip(call.outputs, inference.outputs, strict=True):
            name = wanted.name if isinstance(wanted, TensorRef) else _new_name(graph, f"{anchor.node_id}.{wanted}")
            ref = TensorRef(name, type_.shape, type_.dtype, anchor.device_id)
            if name in old and old[name].type != type_:
                raise TypeMismatch(f"{call.op.op} gives {ref}, want {old[name].type}")
            made[wanted if isinstance(wanted, str) else name] = ref
            outputs.append(ref)
        nodes.append(_node(call, anchor, inputs, outputs, inference.attrs, origins))
    if all(node.node_id != anchor.node_id for node in nodes):
        nodes[-1].node_id = anchor.node_id
    return nodes


def _made(ref: TensorRef | str, made: Mapping[str, TensorRef]) -> TensorRef:
    """An operand: a value that an earlier call makes (anew), or one of the graph."""
    return made[ref] if isinstance(ref, str) else made.get(ref.name, ref)


def _new_name(graph: ExecutionGraph, name: str) -> str:
    while graph.producer(name) is not None or name in graph.inputs or name in graph.weights:
        name += "_"
    return name


def _infer(call: NewCall, inputs: Mapping[str, TensorRef], memo: Memo) -> Inference:
    key = infer_key(call.op, tuple(inputs), list(inputs.values()), call.attrs)
    if key not in memo:
        memo[key] = call.op.resolve({name: ref.type for name, ref in inputs.items()}, call.attrs)
    return memo[key]


def _node(
    call: NewCall,
    anchor: OpNode,
    inputs: Mapping[str, TensorRef],
    outputs: list[TensorRef],
    attrs: Mapping[str, AttrValue],
    origins: tuple[str, ...],
) -> OpNode:
    names = [name for name in call.op.input_types if name in inputs]
    is_prefix = names == list(call.op.input_types)[: len(names)]
    return call.op(
        outputs[0].name,
        call.op.kind,
        [inputs[name] for name in names],
        outputs,
        device_id=anchor.device_id,
        stream_id=anchor.stream_id,
        layer_id=anchor.layer_id,
        metadata={} if is_prefix else {"operands": names},
        attrs=dict(attrs),
        block=anchor.block,
        origins=origins,
    )
