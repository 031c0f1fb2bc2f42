"""What a generated kernel library declares of its kernels: all that a loader needs to call one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sageLLM.runtime.core.ir.dims import Dim, Sym
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.types import TypePattern

Kernel: TypeAlias = Callable[..., Any]
"""A reference kernel: operands by position (None for an absent one), attributes by keyword, outputs in spec order."""


def stride_names(operand: str, pattern: TypePattern) -> tuple[str, ...]:
    """`x_R`, `x_N` for E[..., N, D]: the strides of all declared dims but the last. A compound dim has its place."""
    names = ["R" if dim is ... else str(dim) if isinstance(dim, Sym) else f"D{i}" for i, dim in enumerate(pattern.dims)]
    prefix = "i_stride" if operand == "i" else operand  # `i_T` is an index
    return tuple(f"{prefix}_{name}" for name in names[:-1])


@dataclass(frozen=True, slots=True)
class Part:
    """An output that is a part of an input's memory: where it begins there, and its strides, all in elements.

    The formulas may use the op's dims and the base's own strides, as `stride_names` writes them. `where` are pairs of
    formulas that have to be equal: of merged dims, the outer stride and what the inner dim spans.
    """

    base: str
    offset: Dim
    strides: tuple[Dim, ...]
    where: tuple[tuple[Dim, Dim], ...] = ()


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """One function of a native library, with the C signature that `runtime/kernels/cpu/sage.h` describes.

    `sizes` are the names of the leading sizes: R if there are leading dims, then the op's dims. `parts` holds an entry
    for each output if the op moves no data. An op that `updates` its in-place outputs writes parts of them only, so
    they have to be the inputs' memory; for other ops that is allowed and not needed. `packed` are weights that the
    kernel takes in the packed form of `runtime/kernels/cpu/packed.h`, each with its number of gates;
    the table that it `unpacks` may come packed, and is then read by a function of its own.
    """

    op: type[OpNode]
    source: str
    sizes: tuple[str, ...]
    updates: bool = False
    parts: Mapping[str, Part] | None = None
    packed: Mapping[str, int] = field(default_factory=dict)
    unpacks: str | None = None

    @property
    def symbol(self) -> str:
        return f"sage_{self.op.op}"

    @property
    def element(self) -> str | None:
        """The element variable of the op, for which the file is compiled once per type; None if there is none."""
        patterns = (*self.op.input_types.values(), *self.op.output_types.values())
        return next((pattern.element for pattern in patterns if pattern.is_variable), None)

    def element_in(self, env: Mapping[str, Any]) -> str | None:
        """The element type of one use, by what the op's names stand for in it; of several that differ, all of them.

        A file is compiled for one type, which all variables stand for: there is no function for "f32 and bf16".
        """
        patterns = (*self.op.input_types.values(), *self.op.output_types.values())
        names = dict.fromkeys(pattern.element for pattern in patterns if pattern.is_variable)
        return " and ".join(dict.fromkeys(str(env[name]) for name in names if name in env)) or None
