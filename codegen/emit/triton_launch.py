"""What the launcher of a row kernel does: sizes, outputs, operands as rows, tiles, and the launches."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sageLLM.codegen.emit.dim_text import dim_lines
from sageLLM.codegen.emit.torch_text import TORCH_DTYPES
from sageLLM.codegen.emit.triton_rows import RowKernel, block_name, size_text, stride_name
from sageLLM.codegen.expr.size import LEADING
from sageLLM.codegen.expr.types import DTYPES
from sageLLM.codegen.kernel.rows import Nest, RowProgram
from sageLLM.codegen.model.op import OpDef, Operand

CONSTANTS = ("bool", "str")
"""Types of attrs that a kernel is compiled for; numbers are passed."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One function on the device: `tile` names the function of `tiles.py` that fits it."""

    name: str
    parameters: tuple[str, ...]
    constants: tuple[str, ...]
    lines: tuple[str, ...]
    tile: str
    arguments: tuple[str, ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """One nest: its kernel for rows that fit in a tile, and the one for longer rows if it has reductions."""

    rows: str
    columns: str
    kernel: Kernel
    long: Kernel | None


@dataclass(frozen=True, slots=True)
class RowsView:
    """What `triton_rows.py.jinja` shows of an op."""

    op: OpDef
    kernels: tuple[Kernel, ...]
    before: tuple[str, ...]  # sizes, outputs, operands as rows
    launches: tuple[Launch, ...]
    result: str


def rows_view(op: OpDef, program: RowProgram, *, updates: bool) -> RowsView:
    """An op that `updates` its in-place outputs writes parts of them, so they are the inputs' memory."""
    launches = [_launch(op, nest, f"{number or ''}") for number, nest in enumerate(program.nests)]
    kernels = [kernel for launch in launches for kernel in (launch.kernel, launch.long) if kernel]
    text = "\n".join(line for launch in launches for line in (launch.rows, launch.columns))
    text += "\n" + "\n".join(argument for kernel in kernels for argument in kernel.arguments)
    outputs = [_allocation(op, output, updates=updates) for output in op.outputs]
    as_rows = [_as_rows(operand) for operand in (*op.inputs, *op.outputs) if LEADING in operand.type.dims]
    sizes = _sizes(op, "\n".join([text, *outputs, *as_rows]))
    return RowsView(
        op, tuple(kernels), (*sizes, *outputs, *as_rows), tuple(launches), ", ".join(o.name for o in op.outputs)
    )


def _launch(op: OpDef, nest: Nest, suffix: str) -> Launch:
    whole = RowKernel(op, nest, whole=True)
    columns = list(dict.fromkeys(size_text(loop.extent) for loop in whole.loops)) or ["1"]
    widest = columns[0] if len(columns) == 1 else f"max({', '.join(columns)})"
    if not whole.has_reductions:
        return Launch(whole.rows_text, widest, _kernel(op, f"_{op.name}_kernel{suffix}", whole, "split_tile"), None)
    long = RowKernel(op, nest, whole=False)
    return Launch(whole.rows_text, widest, _kernel(op, f"_{op.name}_rows{suffix}", whole, "row_tile"),
                  _kernel(op, f"_{op.name}_long{suffix}", long, "long_tile"))  # fmt: skip


def _kernel(op: OpDef, name: str, rows: RowKernel, tile: str) -> Kernel:
    text = "\n".join(rows.lines)
    arguments = {key: value for key, value in _arguments(op).items() if re.search(rf"\b{key}\b", text)}
    constants = [attr.name for attr in op.attrs if attr.type in CONSTANTS and attr.name in arguments]
    numbers = [key for key in arguments if key not in constants]
    blocks = [block_name(loop) for loop in rows.loops]
    return Kernel(name, tuple(numbers), tuple(constants), tuple(rows.lines), tile,
                  tuple(arguments[key] for key in numbers), tuple(blocks))  # fmt: skip


def _arguments(op: OpDef) -> Mapping[str, str]:
    """All that a kernel can be given, by the name of its parameter: operands, attrs, sizes, strides."""
    found = {operand.name: _rows_name(operand) for operand in (*op.inputs, *op.outputs)}
    found |= {attr.name: attr.name for attr in op.attrs}
    found |= {symbol: symbol for symbol in (*op.symbols, "R")}
    for operand in (*op.inputs, *op.outputs):
        for place in range(len(operand.type.dims) - 1):
            stride = f"{_rows_name(operand)}.stride({place})"
            found[stride_name(operand, place)] = (
                f"0 if {operand.name} is None else {stride}" if operand.optional else stride
            )
    return found


def _rows_name(operand: Operand) -> str:
    return f"{operand.name}Rows" if LEADING in operand.type.dims else operand.name


def _as_rows(operand: Operand) -> str:
    """`xRows = x.reshape(R, *x.shape[-1:])`: the leading dims as one, without a copy where strides allow."""
    reshaped = f"{operand.name}.reshape(R, *{operand.name}.shape[{1 - len(operand.type.dims)}:])"
    none = f" if {operand.name} is not None else None" if operand.optional else ""
    return f"{operand.name}Rows = {reshaped}{none}"


def _allocation(op: OpDef, output: Operand, *, updates: bool) -> str:
    """`y = torch.empty(*x.shape[:-1], I, dtype=x.dtype, device=x.device)`, or `k_out = k_cache`."""
    if updates and output.name in op.inplace:
        return f"{output.name} = {op.inplace[output.name]}"
    leading = _leading(op)
    sizes = ", ".join(f"*{leading}" if dim == LEADING else size_text(dim) for dim in output.type.dims)
    element, device = output.type.element, op.inputs[0].name
    dtype = f"torch.{TORCH_DTYPES[element]}" if element in DTYPES else f"{op.element_inputs[element]}.dtype"
    return f"{output.name} = torch.empty({sizes}, dtype={dtype}, device={device}.device)"


def _leading(op: OpDef) -> str:
    """The leading dims, of the first input that has them."""
    operand = next((o for o in op.inputs if LEADING in o.type.dims and not o.optional), None)
    return f"{operand.name}.shape[: {1 - len(operand.type.dims)}]" if operand else ""


def _sizes(op: OpDef, text: str) -> Sequence[str]:
    lines = dim_lines(op, [symbol for symbol in op.symbols if re.search(rf"(?<![.\w]){symbol}\b", text)])
    return [*lines, *([f"R = {_leading(op)}.numel()"] if _leading(op) else [])]
