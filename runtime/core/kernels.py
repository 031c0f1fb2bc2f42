"""Declarations of kernels: the calling convention of the references, and the records of the native library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sageLLM.runtime.core.ir.dims import Dim, Sym
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.types import TypePattern

Kernel: TypeAlias = Callable[..., Any]
"""A reference kernel: operands by position (None for an absent one), attributes by keyword, outputs in spec order."""


def stride_names(operand: str, pattern: TypePattern) -> tuple[str, ...]:
    """Stride names of an operand, e.g. `x_R`, `x_N` for E[..., N, D]: one per declared dim but the last.

    A compound dim is named by its position (`x_D1`). The last dim is contiguous, so its stride is not passed.
    """
    names = ["R" if dim is ... else str(dim) if isinstance(dim, Sym) else f"D{i}" for i, dim in enumerate(pattern.dims)]
    prefix = "i_stride" if operand == "i" else operand  # `i_T` is an index
    return tuple(f"{prefix}_{name}" for name in names[:-1])


@dataclass(frozen=True, slots=True)
class Part:
    """An output that is part of an input's memory: its offset in the input and its strides, in elements.

    The formulas may use the op's dims and the strides of the base, as named by `stride_names`. `where` contains pairs
    of formulas that must be equal: for merged dims, the outer stride and the extent of the inner dim.
    """

    base: str
    offset: Dim
    strides: tuple[Dim, ...]
    where: tuple[tuple[Dim, Dim], ...] = ()


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """One function of a native library, with the C signature described in `runtime/kernels/cpu/sage.h`.

    `sizes` names the leading size arguments: R if there are leading dims, then the op's dims. `parts` has an entry for
    each output if the op moves no data. An op that `updates` its in-place outputs writes only parts of them, so they
    must share the inputs' memory; for other in-place ops sharing is optional. `packed` maps each weight that the
    kernel reads in the packed form of `runtime/kernels/cpu/packed.h` to its number of gates; the table named by
    `unpacks` may be packed too, and a separate function then reads it. `caches` are the inputs that are paged KV
    caches, which may be stored as codes (`runtime/core/model/kv_form.py`).
    """

    op: type[OpNode]
    source: str
    sizes: tuple[str, ...]
    updates: bool = False
    parts: Mapping[str, Part] | None = None
    packed: Mapping[str, int] = field(default_factory=dict)
    unpacks: str | None = None
    caches: tuple[str, ...] = ()

    @property
    def is_collective(self) -> bool:
        """Whether the ranks of a group must all call it."""
        return "collective" in self.op.tags

    @property
    def is_point_to_point(self) -> bool:
        """Whether it sends to a rank or receives from one."""
        return "p2p" in self.op.tags

    @property
    def element(self) -> str | None:
        """The op's element variable, or None; the file is compiled once for each type that the variable takes."""
        patterns = (*self.op.input_types.values(), *self.op.output_types.values())
        return next((pattern.element for pattern in patterns if pattern.is_variable), None)

    def element_in(self, env: Mapping[str, Any]) -> str | None:
        """The element type of one use, from the bindings of the op's names.

        A file is compiled for a single type that all element variables share. For several types they are joined by
        "and", which names no function, for use in messages.
        """
        patterns = (*self.op.input_types.values(), *self.op.output_types.values())
        names = dict.fromkeys(pattern.element for pattern in patterns if pattern.is_variable)
        return " and ".join(dict.fromkeys(str(env[name]) for name in names if name in env)) or None
