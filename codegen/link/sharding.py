"""What tensor parallelism makes of a call: the collective that completes its result, and the calls it refuses."""

import ast
from dataclasses import replace
from typing import Literal

from sageLLM.codegen.expr.syntax import Text
from sageLLM.codegen.link.scope import Scope
from sageLLM.codegen.model.layout import OpCall, WeightDef
from sageLLM.codegen.model.op import OpDef, Operand


def with_reduction(scope: Scope, text: Text, linked: OpCall, call: ast.Call) -> OpCall:
    """Notes what completes the result when its weights are divided; refuses what could not be completed."""
    weights = [
        (operand, value.weight)
        for operand, name in zip(linked.op.inputs, linked.args, strict=True)
        if name in scope.values and (value := scope.values[name]).weight is not None and value.weight is not None
    ]
    reduce_: Literal["all_reduce", "all_gather"] | None = None
    shard_op: OpDef | None = None
    for operand, weight in weights:
        if weight.shard is None or weight.shard.kind == "first":
            continue
        wanted = _collective(linked.op, operand, weight)
        if weight.shard.then != wanted:
            message = f"'{weight.name}' is divided along dim {weight.shard.dim}, so its `tp` needs {_then(wanted)}"
            raise text.refuse("SAGE240", message, call, f"`tp: {{shard: {weight.shard.dim}}}` says how it is completed")
        reduce_ = wanted
        if weight.shard.kind == "vocab" and wanted == "all_reduce":
            shard_op = _shard_op(scope, text, linked.op, call)
    for _, weight in weights:
        is_first = weight.shard is not None and weight.shard.kind == "first"
        if is_first != (reduce_ == "all_reduce" and (weight.shard is None or is_first)):
            raise text.refuse("SAGE242", *_bias_words(weight, is_first, call))
    return replace(linked, reduce=reduce_, shard_op=shard_op)


def _bias_words(weight: WeightDef, is_first: bool, call: ast.Call) -> tuple[str, ast.AST, str]:
    if is_first:
        return (
            f"'{weight.name}' is on rank 0 only, but this result is no sum over ranks",
            call,
            "drop `keep: first`",
        )
    return f"'{weight.name}' would be added once per rank", call, "write `tp: {keep: first}`"


def _collective(op: OpDef, operand: Operand, weight: WeightDef) -> Literal["all_reduce", "all_gather"] | None:
    """What completes the result: a sum where the divided dim is contracted, a gather where it stays whole."""
    assert weight.shard is not None, "asked of divided weights only"
    dim = operand.type.dims[weight.shard.dim]
    is_kept = any(set(dim.symbols) & set(size.symbols) for output in op.outputs for size in output.type.dims)
    if not is_kept:
        return "all_reduce"
    return "all_gather" if weight.shard.kind == "vocab" else None


def _shard_op(scope: Scope, text: Text, op: OpDef, call: ast.Call) -> OpDef:
    found = scope.around.ops.get(f"{op.name}_shard")
    if found is None or found.attr("first") is None:
        message = f"no op '{op.name}_shard' with an attr 'first' looks up a divided table"
        raise text.refuse("SAGE240", message, call, "add it to the ops, or do not divide the table")
    return found


def _then(wanted: str | None) -> str:
    return f"`then: {wanted}`" if wanted else "no `then`"
