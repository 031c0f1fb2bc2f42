"""Applies the rewrite that a rule returned to a graph, or states why the graph does not allow it."""

from __future__ import annotations

from collections.abc import Mapping

from sageLLM.runtime.core.errors import IRError, TypeMismatch
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.ir.verify import same_memory
from sageLLM.runtime.core.rewrite.rules import NearMiss, NewCall, Rewrite


def apply_rewrite(
    graph: ExecutionGraph, rewrite: Rewrite, position: Mapping[str, int], memo: Memo | None = None
) -> list[ExecutionNode] | NearMiss:
    """Replaces the matched nodes by the calls, in this graph, and returns the new nodes, or the reason why not.

    A rewrite is refused if other nodes still read a value that it removes, if types do not fit the new ops, or if the
    new nodes lack a valid position: an operand would itself depend on a matched node, which makes a cycle.
    """
    if (reason := _why_not_replaceable(graph, rewrite, position)) is not None:
        return NearMiss(len(rewrite.matched), reason)
    try:
        nodes = _new_nodes(graph, rewrite, memo if memo is not None else {})
    except TypeMismatch as error:
        return NearMiss(len(rewrite.matched), str(error))
    try:
        graph.replace(rewrite.matched, nodes, {result.name: value for result, value in rewrite.same})
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
    # A rule may list calls in an order that destroys a value of the pattern before a later call reads it.
    if (lost := _lost_operand(rewrite)) is not None:
        return f"the replacement reads {lost}, which it removes"
    return (
        _why_no_position(graph, rewrite, matched, position)
        or _why_not_inplace(graph, rewrite, matched, position)
        or _why_not_same(graph, rewrite, matched)
    )


def _why_not_same(graph: ExecutionGraph, rewrite: Rewrite, matched: set[str]) -> str | None:
    """The refusal if a result has another type than the value that replaces it, or is overwritten by a consumer."""
    for result, value in rewrite.same:
        if result.type != value.type:
            return f"{result.name} is {result.type}, but {value.name} is {value.type}"
        shared = same_memory(graph, result.name)
        writers = {user.node_id: user for name in shared for user in graph.users(name) if user.node_id not in matched}
        for node in writers.values():
            overwritten = (
                [node.optional_input(operand) for operand in node.inplace.values()] if isinstance(node, OpNode) else []
            )
            if any(ref is not None and ref.name in shared for ref in overwritten):
                return f"{node.node_id} overwrites {result.name}, and would overwrite {value.name}"
    return None


def _why_not_inplace(
    graph: ExecutionGraph, rewrite: Rewrite, matched: set[str], position: Mapping[str, int]
) -> str | None:
    """The value that a new in-place op would overwrite while it is still used; the same rule as in the verifier."""
    returned = {ref.name for ref in graph.outputs}
    for call in rewrite.calls:
        for operand in call.op.inplace.values():
            ref = call.inputs.get(operand)
            for name in same_memory(graph, ref.name) if isinstance(ref, TensorRef) else ():
                if name in graph.weights or name in returned:
                    role = "a weight" if name in graph.weights else "returned"
                    return f"{call.op.op} overwrites {name}, which is {role}"
                for user in graph.users(name):
                    if user.node_id not in matched and not _runs_before(graph, user, matched, position):
                        return f"{call.op.op} overwrites {name}, which {user.node_id} may read later"
    return None


def _runs_before(graph: ExecutionGraph, node: ExecutionNode, matched: set[str], position: Mapping[str, int]) -> bool:
    """Whether a matched node waits for the node, or the node is a view, which reads nothing itself.

    `position` is the order at the start of the round. It bounds the search: dependencies point to earlier positions,
    so a path cannot return from a position before the node. Nodes that are newer than the round have none and are
    always followed.
    """
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
    """A value of the pattern that a new op reads although no earlier new op produces it again."""
    gone = {ref.name for node in rewrite.matched for ref in node.outputs}
    for call in rewrite.calls:
        for ref in call.inputs.values():
            if isinstance(ref, TensorRef) and ref.name in gone:
                return ref.name
        gone -= {output if isinstance(output, str) else output.name for output in call.outputs}
    return None


def _why_no_position(
    graph: ExecutionGraph, rewrite: Rewrite, matched: set[str], position: Mapping[str, int]
) -> str | None:
    """The refusal if an operand from outside waits for a matched node: the replacement would wait for itself."""
    first = min(position.get(node_id, 0) for node_id in matched)
    pending = [d for node in rewrite.matched for d in node.dependencies if d not in matched]
    seen: set[str] = set()
    while pending:
        node_id = pending.pop()
        if node_id in matched:
            return "an operand depends on a value of the pattern itself"
        if node_id not in seen and position.get(node_id, first) >= first:  # earlier nodes cannot depend on the match
            seen.add(node_id)
            pending += graph.nodes[node_id].dependencies
    return None


def _new_nodes(graph: ExecutionGraph, rewrite: Rewrite, memo: Memo) -> list[ExecutionNode]:
    anchor = rewrite.matched[-1]
    old = {ref.name: ref for node in rewrite.matched for ref in node.outputs}
    origins = tuple(dict.fromkeys(o for node in rewrite.matched for o in (node.origins or (node.node_id,))))
    produced: dict[str, TensorRef] = {}
    nodes: list[ExecutionNode] = []
    for call in rewrite.calls:
        inputs = {name: _operand(ref, produced) for name, ref in call.inputs.items() if ref is not None}
        inference = call.op.resolve_refs(inputs, call.attrs, memo)
        outputs = []
        for output, type_ in zip(call.outputs, inference.outputs, strict=True):
            name = output.name if isinstance(output, TensorRef) else _new_name(graph, f"{anchor.node_id}.{output}")
            ref = TensorRef(name, type_.shape, type_.dtype, anchor.device_id)
            if name in old and old[name].type != type_:
                raise TypeMismatch(f"{call.op.op} produces {ref}, expected {old[name].type}")
            produced[output if isinstance(output, str) else name] = ref
            outputs.append(ref)
        nodes.append(_node(call, anchor, inputs, outputs, inference.attrs, origins))
    if nodes and all(node.node_id != anchor.node_id for node in nodes):
        nodes[-1].node_id = anchor.node_id  # a node that keeps its id makes `graph.replace` local
    return nodes


def _operand(ref: TensorRef | str, produced: Mapping[str, TensorRef]) -> TensorRef:
    """An operand: a value that an earlier call produces, or one of the graph."""
    return produced[ref] if isinstance(ref, str) else produced.get(ref.name, ref)


def _new_name(graph: ExecutionGraph, name: str) -> str:
    while graph.producer(name) is not None or name in graph.inputs or name in graph.weights:
        name += "_"
    return name


def _node(
    call: NewCall,
    anchor: OpNode,
    inputs: Mapping[str, TensorRef],
    outputs: list[TensorRef],
    attrs: Mapping[str, AttrValue],
    origins: tuple[str, ...],
) -> OpNode:
    names = [name for name in call.op.input_types if name in inputs]
    # The operands need naming only if an absent one precedes a present one.
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
