"""The arguments of a C++ kernel by name: what `tensors`, `sizes` and `attrs` hold, in the order of the C signature."""

import re
from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_text import CPP_TYPES, cpp_name, size_text
from sageLLM.codegen.expr.size import LEADING, Size
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
    """`x_T`, `x_N` for E[T, N, D]; the stride of a compound dim has its place as its name."""
    return [f"{operand.name}_{_stride_suffix(place, dim)}" for place, dim in enumerate(operand.type.dims[:-1])]


def _stride_suffix(place: int, dim: Size) -> str:
    return "R" if dim == LEADING else dim.name or f"D{place}"


def declarations(op: OpDef, body: str, whole: str = "int64_t") -> list[str]:
    """Names for those of the arguments that the body uses; whole-number attrs are of the type `whole`."""
    sizes = sizes_of(op)
    lines = [f"const int64_t {name} = sizes[{place}];" for place, name in enumerate(sizes) if _mentions(body, name)]
    next_size = len(sizes)
    outputs = {o.name for o in op.outputs}
    for place, operand in enumerate((*op.inputs, *op.outputs)):
        type_ = CPP_TYPES.get(operand.type.element, operand.type.element)
        pointer = f"{type_}*" if operand.name in outputs else f"const {type_}*"
        if _mentions(body, cpp_name(operand.name)):
            lines.append(f"{pointer} {cpp_name(operand.name)} = ({pointer})tensors[{place}];")
        for name in stride_names(operand):
            if _mentions(body, name):
                lines.append(f"const int64_t {name} = sizes[{next_size}];")
            next_size += 1
    for place, attr in enumerate(op.attrs):
        lines += _attr_lines(attr, place, body, whole)
    return lines


def _attr_lines(attr: Attr, place: int, body: str, whole: str) -> list[str]:
    """`windowGiven` tells whether an optional one is there; an absent one is NaN, which no integer can be."""
    if attr.type == "dim" or not _mentions(body, f"(?:{cpp_name(attr.name)}|{attr.name}Given)"):
        return []
    name, type_ = cpp_name(attr.name), _ATTR_TYPES[attr.type].replace("int64_t", whole)
    if not attr.optional:
        return [f"const {type_} {name} = ({type_})attrs[{place}];"]
    given = f"const bool {attr.name}Given = attrs[{place}] == attrs[{place}];"
    value = [f"const {type_} {name} = {attr.name}Given ? ({type_})attrs[{place}] : 0;"]
    return [given, *(value if _mentions(body, name) else [])]


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None
