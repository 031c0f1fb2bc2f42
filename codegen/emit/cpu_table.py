"""Emits the gather of rows from a packed table: a table that is both embedding and head is stored once."""

from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_text import cpp_name
from sageLLM.codegen.expr.tree import Gather, Ref
from sageLLM.codegen.expr.types import DTYPES
from sageLLM.codegen.kernel.names import stride_name
from sageLLM.codegen.model.op import OpDef


@dataclass(frozen=True, slots=True)
class Unpacks:
    """The table that may be packed, and the lines of the kernel in that case."""

    table: str
    lines: tuple[str, ...]


def unpacks_of(op: OpDef) -> Unpacks | None:
    """The kernel of an op that is `y = gather(table, V, ids)`, rows of a table by a list of ids; None for other ops."""
    if op.op_type != "EMBEDDING" or op.program is None or len(op.program.statements) != 1 or op.program.views:
        return None
    (statement,) = op.program.statements
    match statement.value:
        case Gather(table=Ref(name=table), dim=dim, index=Ref(name=ids)):
            pass
        case _:
            return None
    operand, index, output = op.operand(table), op.operand(ids), op.operand(statement.target)
    if operand is None or index is None or output is None or operand.type.element in DTYPES:
        return None
    if operand.type.dims[:1] != (dim,) or len(operand.type.dims) != 2 or len(index.type.dims) != 1:
        return None
    rows, inner = index.type.dims[0].name, operand.type.dims[1].name
    if rows is None or inner is None or index.type.element != "i32":
        return None
    position = f"i_{rows}"
    row = f"{cpp_name(output.name)} + {position} * {stride_name(output, 0)}"
    line = f"unpack_row({row}, {cpp_name(table)}, {cpp_name(ids)}[{position}], {inner});"
    start = f"parallel_for_rows({rows}, {rows} * {inner}, [=](int64_t {position}) {{"
    return Unpacks(table, (start, f"    {line}", "});"))
