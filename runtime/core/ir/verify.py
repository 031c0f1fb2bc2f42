"""Verifier of execution graphs: the invariants that builders and passes must keep, all checked at once."""

from __future__ import annotations

from collections.abc import Iterator

from sageLLM.runtime.core.errors import CycleError, VerifyError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Memo, OpNode
from sageLLM.runtime.core.ir.reachability import Reachability


def verify(graph: ExecutionGraph) -> None:
    """Raises VerifyError with all problems of a graph: see `find_problems`."""
    graph.reindex()
    if problems := find_problems(graph):
        raise VerifyError(problems)


def find_problems(graph: ExecutionGraph) -> list[str]:
    """A sentence for each broken rule.

    Dependencies exist and form no cycle; every value has one producer and one type, is declared or produced, and its
    users wait for its producer; op nodes fit their declarations; an op that overwrites a value runs after the value's
    other users; metadata is plain JSON data; the membership sets name existing nodes.
    """
    problems = [
        *_check_dependencies(graph),
        *_check_producers(graph),
        *_check_types(graph),
        *_check_uses(graph),
        *_check_ops(graph),
        *_check_metadata(graph),
        *_check_membership(graph),
    ]
    # The check for cycles needs known dependencies, and the check of in-place ops needs a topological order.
    return problems or [*_check_cycles(graph)] or [*_check_inplace(graph)]


def _check_dependencies(graph: ExecutionGraph) -> Iterator[str]:
    for node_id, node in graph.nodes.items():
        if node_id != node.node_id:
            yield f"{node_id}: the node's own id is {node.node_id!r}"
        for dependency in sorted(node.dependencies - graph.nodes.keys()):
            yield f"{node_id}: unknown dependency {dependency!r}"


def _check_cycles(graph: ExecutionGraph) -> Iterator[str]:
    try:
        graph.topological_sort()
    except CycleError as error:
        yield str(error)


def _check_producers(graph: ExecutionGraph) -> Iterator[str]:
    source: dict[str, str] = dict.fromkeys(graph.inputs, "an input of the graph")
    for name in graph.weights:
        if name in source:
            yield f"{name!r} is both an input and a weight"
        source[name] = "a weight of the graph"
    for node in graph.nodes.values():
        for ref in node.outputs:
            if ref.name in source:
                yield f"{node.node_id}: writes {ref.name!r}, which is already {source[ref.name]}"
            source.setdefault(ref.name, f"an output of {node.node_id}")


def _check_types(graph: ExecutionGraph) -> Iterator[str]:
    seen: dict[str, tuple[TensorRef, str]] = {}
    for owner, ref in _refs(graph):
        first, first_owner = seen.setdefault(ref.name, (ref, owner))
        if first.shape != ref.shape or first.dtype != ref.dtype:
            yield f"{owner}: {ref.name!r} is {ref.type}, but {first.type} in {first_owner}"


def _refs(graph: ExecutionGraph) -> Iterator[tuple[str, TensorRef]]:
    yield from (("the inputs", ref) for ref in graph.inputs.values())
    yield from (("the weights", ref) for ref in graph.weights.values())
    for node in graph.nodes.values():
        yield from ((node.node_id, ref) for ref in node.outputs)
    for node in graph.nodes.values():
        yield from ((node.node_id, ref) for ref in node.inputs)
    yield from (("the outputs", ref) for ref in graph.outputs)


def _check_uses(graph: ExecutionGraph) -> Iterator[str]:
    for name, ref in [*graph.inputs.items(), *graph.weights.items()]:
        if name != ref.name:
            yield f"{name!r} is declared as {ref.name!r}"
    declared = graph.inputs.keys() | graph.weights.keys()
    for node in graph.nodes.values():
        for ref in node.inputs:
            producer = graph.producer(ref)
            if ref.name in declared:
                continue
            if producer is None:
                yield f"{node.node_id}: reads the unknown value {ref.name!r}"
            elif producer is not node and producer.node_id not in node.dependencies:
                yield f"{node.node_id}: reads {ref.name!r} without waiting for {producer.node_id}"
    for ref in graph.outputs:
        if graph.producer(ref) is None and ref.name not in declared:
            yield f"the graph returns the unknown value {ref.name!r}"


def _check_ops(graph: ExecutionGraph) -> Iterator[str]:
    memo: Memo = {}
    for node in graph.nodes.values():
        if isinstance(node, OpNode):
            yield from node.problems(memo)


def _check_metadata(graph: ExecutionGraph) -> Iterator[str]:
    for node in graph.nodes.values():
        if node.metadata and (problem := why_not_plain(node.metadata)) is not None:
            yield f"{node.node_id}: metadata must be plain JSON data, got {problem}"


def why_not_plain(data: object) -> str | None:
    """The first part of some data that does not survive a JSON round trip, or None."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return None
    if isinstance(data, list):
        return next((p for item in data if (p := why_not_plain(item)) is not None), None)
    if isinstance(data, dict):
        bad = next((key for key in data if not isinstance(key, str)), None)
        if bad is not None:
            return f"the key {bad!r}"
        return next((p for item in data.values() if (p := why_not_plain(item)) is not None), None)
    return f"a {type(data).__name__}"


def _check_membership(graph: ExecutionGraph) -> Iterator[str]:
    for name in ("prefill_nodes", "decode_nodes", "comm_nodes"):
        for node_id in sorted(getattr(graph, name) - graph.nodes.keys()):
            yield f"{name} names the unknown node {node_id!r}"


def _check_inplace(graph: ExecutionGraph) -> Iterator[str]:
    """In-place ops destroy their operand, so every other user of its memory must surely run before them.

    "Surely" means a path of dependencies: the order of the nodes is not enough, since streams may run in parallel.
    """
    overwriting = [n for n in graph.nodes.values() if isinstance(n, OpNode) and n.inplace]
    if not overwriting:
        return
    reach = Reachability(graph.topological_sort())
    returned = {ref.name for ref in graph.outputs}
    for node in overwriting:
        for name in _overwritten(graph, node):
            action = f"{node.node_id}: {node.op} overwrites"
            if name in graph.weights:
                yield f"{action} the weight {name!r}"
            if name in returned:
                yield f"{action} {name!r}, which the graph returns"
            for user in graph.users(name):
                if user is not node and not reach.waits_for(node.node_id, user.node_id) and not _is_view(user):
                    yield f"{action} {name!r}, and {user.node_id} may read it later"


def _overwritten(graph: ExecutionGraph, node: OpNode) -> Iterator[str]:
    """The names of all values that share memory with an operand that the node overwrites."""
    for operand in node.inplace.values():
        if (ref := node.optional_input(operand)) is not None:
            yield from same_memory(graph, ref.name)


def same_memory(graph: ExecutionGraph, name: str) -> list[str]:
    """A value, the values of which it is a view, and its own views.

    Sibling views are left out: by convention the views that one op returns contain different elements.
    """
    found = [name]
    source = graph.producer(name)
    while source is not None and _is_view(source) and source.inputs:
        found.append(source.inputs[0].name)
        source = graph.producer(source.inputs[0])
    pending = [name]
    while pending:
        views = [ref.name for user in graph.users(pending.pop()) if _is_view(user) for ref in user.outputs]
        found += views
        pending += views
    return found


def _is_view(node: ExecutionNode) -> bool:
    return isinstance(node, OpNode) and node.is_view
