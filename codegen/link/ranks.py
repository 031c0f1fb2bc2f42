"""What an op makes of what one rank has of its operands: derived from its meaning, or declared for a reference."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sageLLM.codegen.expr.parts import NotLinear, PartChecker, Share
from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.link.operands import Match
from sageLLM.codegen.model.op import OpDef, Operand
from sageLLM.codegen.schema.ops import RanksSpec


@dataclass(frozen=True, slots=True)
class Argument:
    """A value that is given to an operand: its type, what a rank has of it, and whether it is surely there."""

    type: ValueType
    share: Share = Share.WHOLE
    is_certain: bool = True


Arguments = Mapping[str, Argument]
"""The operands that are given, by name; the others are absent."""


def result_shares(
    op: OpDef, arguments: Arguments, dims: Mapping[str, Size], divides: frozenset[str], ops: Mapping[str, OpDef]
) -> tuple[Share, ...]:
    """What a rank has of each result; `dims` are the op's dim attrs, `divides` the names of sizes that ranks share.

    Raises NotLinear where a rank's results would neither be its share of the whole nor add up to it.
    """
    match_ = Match(op, dict(dims))
    for operand in op.inputs:
        if operand.name in arguments:
            match_.why_not(operand, arguments[operand.name].type)

    def is_divided(size: Size) -> bool:
        bound = match_.leading or () if size == LEADING else (size.substitute(match_.dims),)
        return any(set(dim.symbols) & divides for dim in bound)

    if op.program is not None:
        return _of_program(op, arguments, is_divided)
    if op.fuses:
        return _of_calls(op, arguments, match_, divides, ops)
    return _of_reference(op, arguments, is_divided)


def _of_program(op: OpDef, arguments: Arguments, is_divided: Callable[[Size], bool]) -> tuple[Share, ...]:
    assert op.program is not None, "asked of computed ops only"
    optional = [operand.name for operand in op.inputs if operand.optional]
    given = {name: _is_given(arguments.get(name)) for name in optional}
    shares = {name: argument.share for name, argument in arguments.items()}
    found = PartChecker(op.program, shares, is_divided, given).outputs(output.name for output in op.outputs)
    return tuple(found.values())


def _is_given(argument: Argument | None) -> bool | None:
    if argument is None:
        return False
    return True if argument.is_certain else None


def _of_calls(
    op: OpDef, arguments: Arguments, match_: Match, divides: frozenset[str], ops: Mapping[str, OpDef]
) -> tuple[Share, ...]:
    """The calls of a fused op one by one, with the types that the values have here."""
    values = dict(arguments)
    for call in op.fuses:
        callee = ops[call.op]
        names = dict(zip((operand.name for operand in callee.inputs), call.args, strict=False))
        inner = {name: values[arg] for name, arg in names.items() if arg is not None and arg in values}
        own = Match(callee)
        for operand in callee.inputs:
            if operand.name in inner:
                own.why_not(operand, inner[operand.name].type)
        shares = result_shares(callee, inner, {}, divides, ops)
        for target, output, share in zip(call.targets, callee.outputs, shares, strict=True):
            values[target] = Argument(own.result(output.type), share)
    return tuple(values[output.name].share for output in op.outputs)


def _of_reference(op: OpDef, arguments: Arguments, is_divided: Callable[[Size], bool]) -> tuple[Share, ...]:
    spec = op.entry.spec.ranks or RanksSpec()
    for operand in op.inputs:
        for symbol in _symbols(operand) if operand.name in arguments else ():
            if is_divided(Size.symbol(symbol)) and symbol not in (*spec.divides, *spec.sums):
                raise NotLinear(f"it needs all of {symbol}, of which a rank has a share")
    parts = {name for name, argument in arguments.items() if argument.share is Share.PART}
    summed = {
        operand.name for operand in op.inputs if operand.name in arguments and _is_summed(operand, spec, is_divided)
    }
    if not parts and not summed:
        return (Share.WHOLE,) * len(op.outputs)
    for group in spec.linear_in:
        present = {name for name in group if name in arguments}
        if parts <= set(group) and (present & (parts | summed)) and parts | summed:
            whole = present - parts - summed
            if whole:
                raise NotLinear("a whole value is added", whole)
            return (Share.PART,) * len(op.outputs)
    raise NotLinear(f"`{op.name}` is not linear")


def _is_summed(operand: Operand, spec: RanksSpec, is_divided: Callable[[Size], bool]) -> bool:
    return any(symbol in spec.sums and is_divided(Size.symbol(symbol)) for symbol in _symbols(operand))


def _symbols(operand: Operand) -> list[str]:
    return [symbol for dim in operand.type.dims for symbol in dim.symbols]
