"""The rules that every execution graph keeps, checked all at once; passes and builders are tested against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sageLLM.runtime.core.errors import CycleError, VerifyError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import Inference, InferKey, OpNode


def verify(graph: ExecutionGraph) -> None:
    """Raises VerifyError with all problems of a graph: see `find_problems`."""
    graph.reindex()
    if problems := find_problems(graph):
        raise VerifyError(problems)


def find_problems(graph: ExecutionGraph) -> list[str]:
    """A sentence for each broken rule.

    Dependencies exist and form no cycle; every value has one writer and one type, is known, and its reader waits for
    its writer; op nodes fit their declarations; an op that overwrites a value runs after the value's other readers;
    metadata is plain JSON data; the membership sets name nodes.
    """
    problems = [
        *_check_dependencies(graph),
        *_check_writers(graph),
        *_check_types(graph),
        *_check_reads(graph),
        *_check_ops(graph),
        *_check_metadata(graph),
        *_check_membership(graph),
    ]
    return problems or [*_check_cycles(graph)] or [*_check_inplace(graph)]


def _check_dependencies(graph: ExecutionGraph) -> Iterator[str]:
    for node_id, node in graph.nodes.items():
        if node_id != node.node_id:
            yield f"{node_id}: the node calls itself {node.node_id!r}"
        for dependency in sorted(node.dependencies - graph.nodes.keys()):
            yield f"{node_id}: depends on {dependency!r}, which does not exist"


def _check_cycles(graph: ExecutionGraph) -> Iterator[str]:
    try:
        graph.topological_sort()
    except CycleError as error:
        yield str(error)


def _check_writers(graph: ExecutionGraph) -> Iterator[str]:
    writer: dict[str, str] = dict.fromkeys(graph.inputs, "the graph's inputs")
    for name in graph.weights:
        if name in writer:
            yield f"{name!r} is both an input and a weight"
        writer[name] = "the graph's weights"
    for node in graph.nodes.values():
        for ref in node.outputs:
            if ref.name in writer:
                yield f"{node.node_id}: writes {ref.name!r}, which {writer[ref.name]} gives already"
            writer.setdefault(ref.name, node.node_id)


def _check_types(graph: ExecutionGraph) -> Iterator[str]:
    seen: dict[str, tuple[TensorRef, str]] = {}
    for place, ref in _refs(graph):
        first, where = seen.setdefault(ref.name, (ref, place))
        if first.shape != ref.shape or first.dtype != ref.dtype:
            yield f"{place}: {ref.name!r} is {ref.type}, but {first.type} in {where}"


def _refs(graph: ExecutionGraph) -> Iterator[tuple[str, TensorRef]]:
    yield from (("the inputs", ref) for ref in graph.inputs.values())
    yield from (("the weights", ref) for ref in graph.weights.values())
    for node in graph.nodes.values():
        yield from ((node.node_id, ref) for ref in node.outputs)
    for node in graph.nodes.values():
        yield from ((node.node_id, ref) for ref in node.inputs)
    yield from (("the outputs", ref) for ref in graph.outputs)


def _check_reads(graph: ExecutionGraph) -> Iterator[str]:
    for name, ref in [*graph.inputs.items(), *graph.weights.items()]:
        if name != ref.name:
            yield f"{name!r} is declared as {ref.name!r}"
    given = graph.inputs.keys() | graph.weights.keys()
    for node in graph.nodes.values():
        for ref in node.inputs:
            writer = graph.producer(ref)
            if ref.name in given:
                continue
            if writer is None:
                yield f"{node.node_id}: reads {ref.name!r}, which nothing gives"
            elif writer is not node and writer.node_id not in node.dependencies:
                yield f"{node.node_id}: reads {ref.name!r} without waiting for {writer.node_id}"
    for ref in graph.outputs:
        if graph.producer(ref) is None and ref.name not in given:
            yield f"the graph returns {ref.name!r}, which nothing gives"


def _check_ops(graph: ExecutionGraph) -> Iterator[str]:
    memo: dict[InferKey, Inference] = {}
    for node in graph.nodes.values():
        if isinstance(node, OpNode):
            yield from node.problems(memo)


def _check_metadata(graph: ExecutionGraph) -> Iterator[str]:
    for node in graph.nodes.values():
        if node.metadata and (problem := why_not_plain(node.metadata)) is not None:
            yield f"{node.node_id}: metadata holds {problem}, want plain JSON data"


def why_not_plain(data: object) -> str | None:
    """What in some data JSON cannot give back as it was, or None."""
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
            yield f"{name} names {node_id!r}, which does not exist"


def _check_inplace(graph: ExecutionGraph) -> Iterator[str]:
    writers = [n for n in graph.nodes.values() if isinstance(n, OpNode) and n.inplace]
    if not writers:
        return
    bit = {node_id: 1 << i for i, node_id in enumerate(graph.nodes)}
    before = _ancestors(graph, bit)
    returned = {ref.name for ref in graph.outputs}
    for node in writers:
        for name in _overwritten(graph, node):
            what = f"{node.node_id}: {node.op} overwrites"
            if name in graph.weights:
                yield f"{what} the weight {name!r}"
            if name in returned:
                yield f"{what} {name!r}, which the graph returns"
            for reader in graph.users(name):
                is_first = before[node.node_id] & bit[reader.node_id]
                if reader is not node and not is_first and not _is_view(reader):
                    yield f"{what} {name!r}, and {reader.node_id} may read it later"


def _overwritten(graph: ExecutionGraph, node: OpNode) -> Iterator[str]:
    """The names of all values that share memory with an operand that the node writes over."""
    for operand in node.inplace.values():
        if (ref := node.optional_input(operand)) is not None:
            yield from same_memory(graph, ref.name)


def same_memory(graph: ExecutionGraph, name: str) -> list[str]:
    """A value, the values it is a view of, and the views of it. Views beside it hold other elements, by convention."""
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


def _ancestors(graph: ExecutionGraph, bit: Mapping[str, int]) -> dict[str, int]:
    """For each node the set of all nodes that must run before it, as a union of their bits."""
    before: dict[str, int] = {}
    for node in graph.topological_sort():
        mask = 0
        for dependency in node.dependencies:
            mask |= before[dependency] | bit[dependency]
        before[node.node_id] = mask
    return before
