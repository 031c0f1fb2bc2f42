"""Ops that begin with a sum over ranks: the rows of the sum, and the rest of the op as loops over these rows.

    allreduce_add_rms_norm:  r = all_reduce(p);  h = add(x, r);  y = rms_norm(h, w)
                             the sum of a row of p goes to the row of h, which the rest reads in place of r

The rest of a row follows its sum, while the row is in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.lower import row_program
from sageLLM.codegen.kernel.rows import Location, RowProgram
from sageLLM.codegen.model.op import Call, OpDef, Operand

ALL_REDUCE = "all_reduce"
Tree = TypeVar("Tree")


@dataclass(frozen=True, slots=True)
class ReducedRows:
    """`partial` is summed over the ranks into `total`, an output with its memory, which `rest` reads and overwrites."""

    partial: Operand
    total: Operand
    rest: RowProgram


def reduced_rows_of(op: OpDef, programs: Programs) -> ReducedRows | None:
    """The op as a sum over ranks and the rest of its rows; None for any other op, and if the rest cannot be lowered."""
    if len(op.fuses) < 2 or programs.ops[op.fuses[0].op].reference is None or op.fuses[0].op != ALL_REDUCE:
        return None
    first, *others = op.fuses
    partial = op.operand(first.args[0] or "")
    total = next((o for o in op.outputs if op.inplace.get(o.name) == (partial.name if partial else "")), None)
    is_read_again = any(partial is not None and partial.name in call.args for call in others)
    if partial is None or total is None or is_read_again or op.operand(first.targets[0]) is not None:
        return None
    calls = tuple(_renamed(call, {first.targets[0]: partial.name}) for call in others)
    try:
        rest = row_program(replace(op, fuses=calls), programs)
    except LoweringError:
        return None
    is_by_row = len(rest.nests) == 1 and len(rest.nests[0].rows) == 1 == len(partial.type.dims) - 1
    return ReducedRows(partial, total, _moved(rest, partial.name, total.name)) if is_by_row else None


def _renamed(call: Call, names: Mapping[str, str]) -> Call:
    return replace(call, args=tuple(names.get(arg, arg) if arg is not None else None for arg in call.args))


def _moved(tree: Tree, operand: str, target: str) -> Tree:
    """The program with all locations of one operand in another."""
    moved: Any = tree
    if isinstance(tree, Location):
        moved = replace(tree, operand=target) if tree.operand == operand else tree
    elif isinstance(tree, tuple):
        moved = tuple(_moved(part, operand, target) for part in tree)
    elif is_dataclass(tree) and not isinstance(tree, type):
        moved = replace(tree, **{one.name: _moved(getattr(tree, one.name), operand, target) for one in fields(tree)})
    return moved  # type: ignore[no-any-return]
