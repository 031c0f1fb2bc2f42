"""Propagates partial sums through an op under tensor parallelism.

The state of each result on one rank follows from an op's `compute` or `fuses`; for a `reference` the spec declares it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sageLLM.codegen.expr.partial_sums import NotLinear, PartialSumChecker, SumState
from sageLLM.codegen.expr.size import LEADING, Size, formula
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.operands import Match
from sageLLM.codegen.model.op import OpDef, Operand
from sageLLM.codegen.schema.ops import OpShardingSpec


@dataclass(frozen=True, slots=True)
class Argument:
    """A value passed to an operand: its type, its state on one rank, and whether it is always present."""

    type: ValueType
    state: SumState = SumState.COMPLETE
    is_certain: bool = True


Arguments = Mapping[str, Argument]
"""The values passed, by operand name; the other operands are absent."""


def result_states(
    op: OpDef,
    arguments: Arguments,
    dims: Mapping[str, Size],
    divides: frozenset[str],
    ops: Mapping[str, OpDef],
    divided: dict[str, bool] | None = None,
) -> tuple[SumState, ...]:
    """The state of each result on one rank; `dims` are the op's dim attrs, `divides` the sizes divided over ranks.

    Raises NotLinear where a rank's results would be neither its shard of the result nor a summand of it. Records in
    `divided` which sizes of the op the result depends on, and whether ranks divide them.
    """
    match_ = Match(op, dict(dims))
    for operand in op.inputs:
        if operand.name in arguments:
            match_.bind(operand, arguments[operand.name].type)

    def is_divided(size: Size) -> bool:
        bound = match_.leading or () if size == LEADING else (size.substitute(match_.dims),)
        is_shared = any(set(dim.symbols) & divides for dim in bound)
        if divided is not None:
            divided[formula(size)] = is_shared
        return is_shared

    if op.program is not None:
        return _of_program(op, arguments, is_divided)
    if op.fuses:
        return _of_calls(op, arguments, match_, divides, ops)
    return _of_reference(op, arguments, is_divided)


def known_states(
    op: OpDef, states: Mapping[str, tuple[str, bool]], divided: Mapping[str, bool]
) -> tuple[SumState, ...] | None:
    """The result of `result_states` for the recorded arguments of an earlier call, or None if it would refuse them.

    `states` are the state and the certainty of each argument, `divided` the recorded answers about sizes. Also None for
    a fused op: its states follow from those of the ops that it calls.
    """
    arguments = {name: Argument(_ANY_TYPE, SumState(state), is_certain) for name, (state, is_certain) in states.items()}
    if op.fuses:
        return None
    of_op = _of_program if op.program is not None else _of_reference
    try:
        return of_op(op, arguments, lambda size: divided[formula(size)])
    except (NotLinear, KeyError):
        return None


_ANY_TYPE = ValueType("", ())


def _of_program(op: OpDef, arguments: Arguments, is_divided: Callable[[Size], bool]) -> tuple[SumState, ...]:
    assert op.program is not None, "called for ops with `compute` only"
    optional = [operand.name for operand in op.inputs if operand.optional]
    present = {name: _is_present(arguments.get(name)) for name in optional}
    states = {name: argument.state for name, argument in arguments.items()}
    found = PartialSumChecker(op.program, states, is_divided, present).outputs(output.name for output in op.outputs)
    return tuple(found.values())


def _is_present(argument: Argument | None) -> bool | None:
    """Whether the argument is present; None where that depends on the config."""
    if argument is None:
        return False
    return True if argument.is_certain else None


def _of_calls(
    op: OpDef, arguments: Arguments, match_: Match, divides: frozenset[str], ops: Mapping[str, OpDef]
) -> tuple[SumState, ...]:
    """The states after the calls of a fused op, one by one, with the types of this call's arguments."""
    values = dict(arguments)
    for call in op.fuses:
        callee = ops[call.op]
        names = dict(zip((operand.name for operand in callee.inputs), call.args, strict=False))
        inner = {name: values[arg] for name, arg in names.items() if arg is not None and arg in values}
        own = Match(callee)
        for operand in callee.inputs:
            if operand.name in inner:
                own.bind(operand, inner[operand.name].type)
        states = result_states(callee, inner, {}, divides, ops)
        for target, output, state in zip(call.targets, callee.outputs, states, strict=True):
            values[target] = Argument(own.result(output.type), state)
    return tuple(values[output.name].state for output in op.outputs)


def _of_reference(op: OpDef, arguments: Arguments, is_divided: Callable[[Size], bool]) -> tuple[SumState, ...]:
    spec = op.entry.spec.tp or OpShardingSpec()
    for operand in op.inputs:
        for symbol in _symbols(operand) if operand.name in arguments else ():
            if is_divided(Size.symbol(symbol)) and symbol not in (*spec.divides, *spec.sums):
                raise NotLinear(f"it requires all of {symbol}, which is divided over the ranks")
    partial = {name for name, argument in arguments.items() if argument.state is SumState.PARTIAL}
    summed = {
        operand.name for operand in op.inputs if operand.name in arguments and _is_summed(operand, spec, is_divided)
    }
    if not partial and not summed:
        return (SumState.COMPLETE,) * len(op.outputs)
    for group in spec.linear_in:
        present = {name for name in group if name in arguments}
        if partial <= set(group) and (present & (partial | summed)) and partial | summed:
            complete = present - partial - summed
            if complete:
                raise NotLinear("a complete value is added to a partial sum", complete)
            return (SumState.PARTIAL,) * len(op.outputs)
    raise NotLinear(f"`{op.name}` is not linear")


def _is_summed(operand: Operand, spec: OpShardingSpec, is_divided: Callable[[Size], bool]) -> bool:
    return any(symbol in spec.sums and is_divided(Size.symbol(symbol)) for symbol in _symbols(operand))


def _symbols(operand: Operand) -> list[str]:
    return [symbol for dim in operand.type.dims for symbol in dim.symbols]
