"""Names in Triton kernels that follow from a loop, and the text of sizes and indices."""

import re

from sageLLM.codegen.expr.size import LEADING, Size, formula
from sageLLM.codegen.kernel.rows import Affine, Loop


def inside_name(loop: Loop) -> str:
    """`in_H`, the mask of the columns that exist."""
    return f"in_{loop.variable.removeprefix('i_')}"


def block_name(loop: Loop) -> str:
    """`BLOCK_H`, the number of columns that a program holds at once."""
    return f"BLOCK_{loop.variable.removeprefix('i_')}"


def size_text(size: Size) -> str:
    return "R" if size == LEADING else formula(size)


def affine(at: Affine) -> str:
    parts = [] if at.offset == Size.of(0) else [size_text(at.offset)]
    for variable, factor in at.terms:
        parts.append(variable if factor == Size.of(1) else f"{bracketed(size_text(factor))} * {variable}")
    return " + ".join(parts) or "0"


def bracketed(text: str) -> str:
    return text if re.fullmatch(r"\w+", text) else f"({text})"
