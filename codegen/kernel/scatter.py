"""The paged KV cache: its operands, and stores at positions from data, which the compute language cannot express."""

from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import Binary, DimRef, Expr, Program, Ref, Statement
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.model.op import OpDef, Operand

KV_STORE = "reference/kv_store.py.jinja"
BLOCK_SLOTS = "BS"
"""The dim of the slots of a block, the second one of every cache."""


def is_cache(operand: Operand) -> bool:
    """Whether the operand is a paged cache: [pages, BS, heads, width]."""
    dims = operand.type.dims
    return len(dims) == 4 and dims[1].name == BLOCK_SLOTS


def cache_names(op: OpDef) -> tuple[str, ...]:
    """The inputs of the op that are paged caches."""
    return tuple(operand.name for operand in op.inputs if is_cache(operand))


@dataclass(frozen=True, slots=True)
class Scatter(Statement):
    """`target[index, ...] = value`: `index` has the positions along some dims; other elements stay."""

    index: tuple[tuple[Size, Expr], ...] = ()


def kv_store_program(op: OpDef) -> Program | None:
    """The equations of `templates/reference/kv_store`: slot = block * BS + offset. None for other ops."""
    if op.reference is None or op.reference.template != KV_STORE:
        return None
    k, v, _, _, slots = op.inputs
    pages, page_size = op.outputs[0].type.dims[:2]
    slot, size = Ref(slots.type, slots.name), DimRef(ValueType("int"), page_size)
    index = ((pages, Binary(slots.type, "//", slot, size)), (page_size, Binary(slots.type, "%", slot, size)))
    pairs = zip(op.outputs, (k, v), strict=True)
    return Program((), tuple(Scatter(output.name, Ref(x.type, x.name), index) for output, x in pairs))


def is_scattered(op: OpDef, ops: Mapping[str, OpDef]) -> bool:
    """Whether the op writes only parts of its in-place outputs, so that they must be the memory of the inputs."""
    return kv_store_program(op) is not None or any(is_scattered(ops[call.op], ops) for call in op.fuses)
