"""What tensor parallelism makes of a call: the collective that completes its result, and the calls it refuses."""

import ast
from dataclasses import replace
from typing import Literal

from sageLLM.codegen.expr.parts import NotLinear, Share
from sageLLM.codegen.expr.syntax import Refused, Text
from sageLLM.codegen.link.ranks import Argument, result_shares
from sageLLM.codegen.link.scope import Scope, Value, part_words
from sageLLM.codegen.model.layout import OpCall, ShardDef, WeightDef
from sageLLM.codegen.model.op import OpDef, Operand

Collective = Literal["all_reduce", "all_gather"]


def with_reduction(scope: Scope, text: Text, linked: OpCall, call: ast.Call) -> tuple[OpCall, tuple[str, ...]]:
    """Notes what completes the result over the ranks, and which targets are parts of a sum until then.

    Refuses a call whose results are neither a rank's share of the whole nor parts that add up to it.
    """
    reduce_: Collective | None = None
    shard_op: OpDef | None = None
    for operand, weight, shard in _divided_weights(scope, linked):
        wanted = _collective(linked.op, operand, shard)
        if shard.then != wanted:
            message = f"'{weight.name}' is divided along dim {shard.dim}, so its `tp` needs {_then(wanted)}"
            raise text.refuse("SAGE240", message, call, f"`tp: {{shard: {shard.dim}}}` says how it is completed")
        reduce_ = wanted
        if shard.kind == "vocab" and wanted == "all_reduce":
            shard_op = _shard_op(scope, text, linked.op, call)
    if shard_op is not None:
        return replace(linked, reduce=reduce_, shard_op=shard_op), linked.targets
    shares = checked_shares(scope, text, linked, call, reduce_)
    parts = tuple(target for target, share in zip(linked.targets, shares, strict=False) if share is Share.PART)
    given = {name for name in linked.args if name in scope.values and scope.values[name].is_partial}
    scope.handed_on |= {name for name in given if name is not None}
    if parts and not given:
        reduce_ = "all_reduce"
    if reduce_ == "all_reduce" and parts != linked.targets and not scope.is_block:
        message = f"of the results of {linked.op.name} only {', '.join(parts)} would be summed over the ranks"
        raise text.refuse("SAGE244", message, call, "call it in a block")
    return replace(linked, reduce=reduce_), parts


def checked_shares(
    scope: Scope, text: Text, linked: OpCall, call: ast.Call, reduce_: Collective | None = None
) -> tuple[Share, ...]:
    """What a rank has of each result; raises Refused where that is of no use."""
    arguments = _arguments(scope, linked)
    dims = scope.dim_attrs(text, linked.op, call)
    try:
        return result_shares(linked.op, arguments, dims, scope.around.divides, scope.around.ops)
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
    """What a rank has of each operand; a weight that is kept on the first rank is a sum's part, as zeros are."""
    found: dict[str, Argument] = {}
    for operand, name in zip(linked.op.inputs, linked.args, strict=True):
        type_ = scope.type_of(name) if name is not None else None
        if type_ is None:
            continue
        value = _value(scope, name)
        is_part = value is not None and (value.is_partial or _is_first(value))
        is_certain = value is None or not value.is_optional
        found[operand.name] = Argument(type_, Share.PART if is_part else Share.WHOLE, is_certain)
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
    """Says why the call is refused, in words of the layout."""
    names = {operand.name: name for operand, name in zip(linked.op.inputs, linked.args, strict=True) if name}
    parts = [names[operand] for operand, argument in arguments.items() if argument.share is Share.PART]
    first = [name for name in parts if (value := _value(scope, name)) is not None and _is_first(value)]
    added = [names[operand] for operand in _in_order(linked, problem.added) if operand in names]
    weights = [name for name in added if (value := _value(scope, name)) is not None and value.weight is not None]
    if first and len(first) == len(parts) and reduce_ is None:
        message = f"'{first[0]}' is on rank 0 only, but this result is no sum over ranks"
        return text.refuse("SAGE242", message, call, "drop `keep: first`")
    if weights and problem.added:
        message = f"'{weights[-1]}' would be added once per rank"
        return text.refuse("SAGE242", message, call, "write `tp: {keep: first}`")
    nodes = [node for node in call.args if isinstance(node, ast.Name) and node.id in parts and node.id not in first]
    if nodes:
        reason = f"'{added[0]}' would be added once per rank" if added else f"in {linked.op.name} {problem}"
        return text.refuse("SAGE241", *part_words(nodes[0], reason))
    local = sorted({symbol for argument in arguments.values() for dim in argument.type.dims for symbol in dim.symbols})
    divided = ", ".join(symbol for symbol in local if symbol in scope.around.divides)
    message = f"{linked.op.name} cannot work on a rank's share: {problem}"
    return text.refuse("SAGE244", message, call, f"take {divided} out of `tp.divides`, so that every rank has it whole")


def _in_order(linked: OpCall, operands: frozenset[str]) -> list[str]:
    """The operands in the order of the op."""
    return [operand.name for operand in linked.op.inputs if operand.name in operands]


def _collective(op: OpDef, operand: Operand, shard: ShardDef) -> Collective | None:
    """What completes the result: a sum where the divided dim is contracted, a gather where it stays whole."""
    dim = operand.type.dims[shard.dim]
    is_kept = any(set(dim.symbols) & set(size.symbols) for output in op.outputs for size in output.type.dims)
    if not is_kept:
        return "all_reduce"
    return "all_gather" if shard.kind == "vocab" else None


def _shard_op(scope: Scope, text: Text, op: OpDef, call: ast.Call) -> OpDef:
    found = scope.around.ops.get(f"{op.name}_shard")
    if found is None or found.attr("first") is None:
        message = f"no op '{op.name}_shard' with an attr 'first' looks up a divided table"
        raise text.refuse("SAGE240", message, call, "add it to the ops, or do not divide the table")
    return found


def _then(wanted: str | None) -> str:
    return f"`then: {wanted}`" if wanted else "no `then`"
