"""Links calls for tensor parallelism: the collective that completes a result, and calls that are refused."""

import ast
from dataclasses import replace
from typing import Literal

from sageLLM.codegen.expr.partial_sums import NotLinear, SumState
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.link.partial_sums import Argument
from sageLLM.codegen.link.scope import Scope, Value, partial_sum_finding
from sageLLM.codegen.model.layout import OpCall, ShardDef, WeightDef
from sageLLM.codegen.model.op import OpDef, Operand

Collective = Literal["all_reduce", "all_gather"]


def with_reduction(scope: Scope, text: Text, linked: OpCall, call: ast.Call) -> tuple[OpCall, tuple[str, ...]]:
    """The call with the collective that completes its result, and the targets that are partial sums until then.

    Raises Refused if the results on one rank are neither its shard of the result nor a summand of it.
    """
    reduce_: Collective | None = None
    shard_op: OpDef | None = None
    for operand, weight, shard in _divided_weights(scope, linked):
        required = _collective(linked.op, operand, shard)
        if shard.then != required:
            message = f"'{weight.name}' is sharded along dim {shard.dim}, so its `tp` must have {_then(required)}"
            raise text.refuse("SAGE240", message, call, _then_remedy(shard.dim, required))
        reduce_ = required
        if shard.kind == "vocab" and required == "all_reduce":
            shard_op = _shard_op(scope, text, linked.op, call)
    if shard_op is not None:
        return replace(linked, reduce=reduce_, shard_op=shard_op), linked.targets
    states = checked_states(scope, text, linked, call, reduce_)
    parts = tuple(target for target, state in zip(linked.targets, states, strict=False) if state is SumState.PARTIAL)
    partial_args = {name for name in linked.args if name in scope.values and scope.values[name].is_partial}
    scope.passed_on |= {name for name in partial_args if name is not None}
    if parts and not partial_args:
        reduce_ = "all_reduce"
    if reduce_ == "all_reduce" and parts != linked.targets and not scope.is_block:
        message = f"either all results of {linked.op.name} must be partial sums or none, got only {', '.join(parts)}"
        raise text.refuse("SAGE244", message, call, "call it in a block, which reduces its results one by one")
    return replace(linked, reduce=reduce_), parts


def checked_states(
    scope: Scope, text: Text, linked: OpCall, call: ast.Call, reduce_: Collective | None = None
) -> tuple[SumState, ...]:
    """The state of each result on one rank; raises Refused where it is neither complete nor a partial sum."""
    arguments = _arguments(scope, linked)
    dims = scope.dim_attrs(text, linked.op, call)
    try:
        return scope.context.ops.result_states(linked.op.name, arguments, dims, scope.context.divides)
    except NotLinear as problem:
        raise _refused(scope, text, linked, arguments, call, problem, reduce_) from None


def _value(scope: Scope, name: str | None) -> Value | None:
    return scope.values.get(name) if name is not None else None


def _divided_weights(scope: Scope, linked: OpCall) -> list[tuple[Operand, WeightDef, ShardDef]]:
    found: list[tuple[Operand, WeightDef, ShardDef]] = []
    for operand, name in zip(linked.op.inputs, linked.args, strict=True):
        value = _value(scope, name)
        shard = value.weight.shard if value is not None and value.weight is not None else None
        if value is not None and value.weight is not None and shard is not None and shard.kind != "first":
            found.append((operand, value.weight, shard))
    return found


def _arguments(scope: Scope, linked: OpCall) -> dict[str, Argument]:
    """The operands with their state on one rank; a weight kept on rank 0 only is a partial sum: zero elsewhere."""
    found: dict[str, Argument] = {}
    for operand, name in zip(linked.op.inputs, linked.args, strict=True):
        type_ = scope.type_of(name) if name is not None else None
        if type_ is None:
            continue
        value = _value(scope, name)
        is_part = value is not None and (value.is_partial or _is_first(value))
        is_certain = value is None or not value.is_optional
        found[operand.name] = Argument(type_, SumState.PARTIAL if is_part else SumState.COMPLETE, is_certain)
    return found


def _is_first(value: Value) -> bool:
    return value.weight is not None and value.weight.shard is not None and value.weight.shard.kind == "first"


def _refused(
    scope: Scope,
    text: Text,
    linked: OpCall,
    arguments: dict[str, Argument],
    call: ast.Call,
    problem: NotLinear,
    reduce_: Collective | None,
) -> Refused:
    """The finding about a refused call, in terms of the layout."""
    names = {operand.name: name for operand, name in zip(linked.op.inputs, linked.args, strict=True) if name}
    parts = [names[operand] for operand, argument in arguments.items() if argument.state is SumState.PARTIAL]
    first = [name for name in parts if (value := _value(scope, name)) is not None and _is_first(value)]
    added = [names[operand] for operand in _in_order(linked, problem.added) if operand in names]
    weights = [name for name in added if (value := _value(scope, name)) is not None and value.weight is not None]
    if first and len(first) == len(parts) and reduce_ is None:
        message = f"'{first[0]}' is kept on rank 0 only, but this result is not summed over the ranks"
        return text.refuse("SAGE242", message, call, "remove `keep: first`")
    if weights and problem.added:
        message = f"'{weights[-1]}' would be added once per rank"
        return text.refuse("SAGE242", message, call, "write `tp: {keep: first}`")
    nodes = [node for node in call.args if isinstance(node, ast.Name) and node.id in parts and node.id not in first]
    if nodes:
        reason = f"'{added[0]}' would be added once per rank" if added else f"in {linked.op.name} {problem}"
        return text.refuse("SAGE241", *partial_sum_finding(nodes[0], reason))
    local = sorted({symbol for argument in arguments.values() for dim in argument.type.dims for symbol in dim.symbols})
    divided = ", ".join(symbol for symbol in local if symbol in scope.context.divides)
    message = f"{linked.op.name} must not run on sharded operands: {problem}"
    return text.refuse(
        "SAGE244", message, call, f"remove {divided} from `tp.divides`, so that every rank has all of it"
    )


def _in_order(linked: OpCall, operands: frozenset[str]) -> list[str]:
    """The operands in the order of the op."""
    return [operand.name for operand in linked.op.inputs if operand.name in operands]


def _collective(op: OpDef, operand: Operand, shard: ShardDef) -> Collective | None:
    """The collective that completes the result: a sum over a contracted dim, a gather of a sharded vocabulary."""
    dim = operand.type.dims[shard.dim]
    is_kept = any(set(dim.symbols) & set(size.symbols) for output in op.outputs for size in output.type.dims)
    if not is_kept:
        return "all_reduce"
    return "all_gather" if shard.kind == "vocab" else None


def _shard_op(scope: Scope, text: Text, op: OpDef, call: ast.Call) -> OpDef:
    found = scope.context.ops.get(f"{op.name}_shard")
    if found is None or found.attr("first") is None:
        message = f"a lookup in a sharded table requires an op '{op.name}_shard' with an attr 'first'"
        raise text.refuse("SAGE240", message, call, "add this op, or do not shard the table")
    return found


def _then(collective: str | None) -> str:
    return f"`then: {collective}`" if collective else "no `then`"


def _then_remedy(dim: int, collective: str | None) -> str:
    return f"write `tp: {{shard: {dim}, then: {collective}}}`" if collective else f"write `tp: {{shard: {dim}}}`"
