"""Names in Triton kernels that follow from a loop."""

from sageLLM.codegen.kernel.rows import Loop


def inside_name(loop: Loop) -> str:
    """`in_H`, the mask of the columns that exist."""
    return f"in_{loop.variable.removeprefix('i_')}"


def block_name(loop: Loop) -> str:
    """`BLOCK_H`, the number of columns that a program holds at once."""
    return f"BLOCK_{loop.variable.removeprefix('i_')}"
