"""Checks that the definition of an op reads all of its inputs and attrs."""

from collections.abc import Iterable, Sequence

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.expr.tree import DimRef, Reduce, View, names_read, walk
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.model.op import AttrFormula, AttrName, OpDef, Operand


def check_unused(op: OpDef, sink: Sink) -> None:
    """Reports inputs and attrs that are never read. The template of a `reference` is not searched."""
    if op.reference is not None:
        return
    read = _names_read(op)
    dims = _dims_read(op)
    for operand in op.inputs:
        if operand.name not in read and not _determines(operand, op, dims):
            span = op.entry.key_span("inputs", operand.name)
            sink.error("SAGE136", f"the input '{operand.name}' is never used", span, "use it or remove it")
    assigned = {statement.target for statement in op.program.statements} if op.program else set()
    for view in op.program.views if op.program else ():
        if view.name not in read | assigned:
            span = op.entry.key_span("views", view.name)
            sink.error("SAGE136", f"the view '{view.name}' is never used", span, "use it or remove it")
    for attr in op.attrs:
        if attr.name not in (dims if attr.type == "dim" else read):
            span = op.entry.key_span("attrs", attr.name)
            sink.error("SAGE136", f"the attr '{attr.name}' is never used", span, "use it or remove it")


def _names_read(op: OpDef) -> set[str]:
    """Names of operands and attrs that the definition reads, also by views and conditions."""
    values = [statement.value for statement in op.program.statements] if op.program else []
    values += [condition.value for condition in op.where]
    read = {name for value in values for name in names_read(value)}
    if op.program is not None:
        read |= _bases_of(read | {statement.target for statement in op.program.statements}, op.program.views)
    for call in op.fuses:
        read |= {arg for arg in call.args if arg is not None}
        for _, value in call.kwargs:
            read |= {value.name} if isinstance(value, AttrName) else set()
            read |= {*value.names} if isinstance(value, AttrFormula) else set()
    return read


def _bases_of(used: set[str], views: Sequence[View]) -> set[str]:
    """The operands and views of which used views are parts, at any depth."""
    bases = {view.name: view.base for view in views}
    found: set[str] = set()
    for name in used & bases.keys():
        while (base := bases.get(name)) is not None and base not in found:
            found.add(base)
            name = base
    return found


def _dims_read(op: OpDef) -> set[str]:
    """The dims in the types of outputs and other operands, in views, in expressions and in calls."""
    types = [one.type for one in (*op.inputs, *op.outputs)]
    values = [statement.value for statement in op.program.statements] if op.program else []
    values += [condition.value for condition in op.where]
    values += [attr.formula for attr in op.attrs if attr.formula is not None]
    nodes = [node for value in values for node in walk(value)]
    sizes = [node.size for node in nodes if isinstance(node, DimRef)]
    sizes += [node.dim for node in nodes if isinstance(node, Reduce)]
    for view in op.program.views if op.program else ():
        types.append(view.type)
        sizes += [size for cut in view.slices if cut for size in (cut.start, cut.stop)]
    found = _symbols(types) | {symbol for size in sizes for symbol in size.symbols}
    given = [value for call in op.fuses for _, value in call.kwargs]
    found |= {value.name for value in given if isinstance(value, AttrName)}
    return found | {name for value in given if isinstance(value, AttrFormula) for name in value.names}


def _determines(operand: Operand, op: OpDef, dims: set[str]) -> bool:
    """Whether the operand is the only one with a dim that the op needs: `like: "E[N, H]"` for a result of N rows."""
    others = _symbols(other.type for other in op.inputs if other.name != operand.name)
    needed = _symbols(output.type for output in op.outputs) | (dims - _symbols([operand.type]))
    return bool((_symbols([operand.type]) - others) & needed)


def _symbols(types: Iterable[ValueType]) -> set[str]:
    return {symbol for type_ in types for dim in type_.dims for symbol in dim.symbols}
