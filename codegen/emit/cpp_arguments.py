"""Arguments of a C++ kernel by name: the contents of `tensors`, `sizes` and `attrs`, in the order of the signature."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_text import CPP_TYPES, cpp_name, size_text
from sageLLM.codegen.expr.size import LEADING
from sageLLM.codegen.kernel.names import OwnNames, stride_name
from sageLLM.codegen.kernel.scatter import is_cache
from sageLLM.codegen.model.op import Attr, OpDef, Operand

_ATTR_TYPES = {"f32": "float", "i32": "int64_t", "bool": "bool", "str": "int64_t"}


@dataclass(frozen=True, slots=True)
class OperandText:
    """An operand as a template writes it: its name, its dims, and the strides of all dims but the last."""

    name: str
    dims: tuple[str, ...]
    strides: tuple[str, ...]

    @staticmethod
    def of(operand: Operand) -> "OperandText":
        dims = tuple(f"({text})" if " " in (text := size_text(dim)) else text for dim in operand.type.dims)
        return OperandText(cpp_name(operand.name), dims, tuple(stride_names(operand)))

    def __str__(self) -> str:
        return self.name


def sizes_of(op: OpDef) -> tuple[str, ...]:
    """R if there are leading dims, then the op's dims."""
    has_leading = any(LEADING in o.type.dims for o in (*op.inputs, *op.outputs))
    return (*(("R",) if has_leading else ()), *op.symbols)


def stride_names(operand: Operand) -> list[str]:
    """`x_T`, `x_N` for E[T, N, D]."""
    return [stride_name(operand, position) for position in range(len(operand.type.dims) - 1)]


def presence_name(attr: Attr, own: OwnNames) -> str:
    """`has_window`: whether an optional attr is present."""
    return own(f"has_{attr.name}")


WEIGHT = "Weight"
"""The element type of packed weights: that of the file, or a form of codes (`runtime/kernels/cpu/coded.h`)."""
CACHE = "Cache"
"""The element type of KV caches: that of the file, or a form of codes (`runtime/kernels/cpu/kv_forms.h`)."""


def declarations(
    op: OpDef, own: OwnNames, body: str, integer: str = "int64_t", packed: Collection[str] = ()
) -> list[str]:
    """Declares those of the arguments that the body uses; `integer` is the type of integer attrs."""
    sizes = sizes_of(op)
    lines = [f"const int64_t {name} = sizes[{i}];" for i, name in enumerate(sizes) if _mentions(body, name)]
    next_size = len(sizes)
    outputs = {o.name for o in op.outputs}
    for position, operand in enumerate((*op.inputs, *op.outputs)):
        element = CPP_TYPES.get(operand.type.element, operand.type.element)
        type_ = WEIGHT if operand.name in packed else CACHE if is_cache(operand) else element
        pointer = f"{type_}*" if operand.name in outputs else f"const {type_}*"
        if _mentions(body, cpp_name(operand.name)):
            lines.append(f"{pointer} {cpp_name(operand.name)} = ({pointer})tensors[{position}];")
        for name in stride_names(operand):
            if _mentions(body, name):
                lines.append(f"const int64_t {name} = sizes[{next_size}];")
            next_size += 1
    for position, attr in enumerate(op.attrs):
        lines += _attr_lines(attr, position, own, body, integer)
    return lines


def _attr_lines(attr: Attr, position: int, own: OwnNames, body: str, integer: str) -> list[str]:
    """An absent attr is NaN, the only number that differs from itself."""
    name, presence = cpp_name(attr.name), presence_name(attr, own)
    if attr.type == "dim" or not _mentions(body, f"(?:{name}|{presence})"):
        return []
    type_ = _ATTR_TYPES[attr.type].replace("int64_t", integer)
    if not attr.optional:
        return [f"const {type_} {name} = ({type_})attrs[{position}];"]
    declared = f"const bool {presence} = attrs[{position}] == attrs[{position}];"
    value = [f"const {type_} {name} = {presence} ? ({type_})attrs[{position}] : 0;"]
    return [declared, *(value if _mentions(body, name) else [])]


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None
