"""The launcher of a row kernel: sizes, outputs, operands as rows, tiles, and the launches."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sageLLM.codegen.emit.dim_text import dim_lines, leading_text
from sageLLM.codegen.emit.torch_text import TORCH_DTYPES
from sageLLM.codegen.emit.triton_names import block_name, size_text
from sageLLM.codegen.emit.triton_rows import RowKernel
from sageLLM.codegen.expr.size import LEADING
from sageLLM.codegen.expr.types import DTYPES
from sageLLM.codegen.kernel.names import OwnNames, own_names, stride_name
from sageLLM.codegen.kernel.rows import Nest, RowProgram, Store
from sageLLM.codegen.model.op import OpDef, Operand

CONSTANTS = ("bool", "str")
"""Types of attrs that a kernel is compiled for; numbers are passed."""

COUNTS = ("R", "T", "B", "S")
"""Sizes that differ from step to step. For the others, which a model fixes, kernels are compiled."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One function on the device."""

    name: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """One nest: its kernel, the one for longer rows if it has reductions, and what both of them take.

    `tile` calls the function of `tiles.py` that chooses between them by the number of columns.
    """

    kernel: Kernel
    looped: Kernel | None
    parameters: tuple[str, ...]
    setup: tuple[str, ...]  # `columns = max(D, Dr)`
    condition: str  # `R > 0 and H > 0`: there is something to store; "" for a single element
    rows: str
    tile: str  # `row_tile(H)`
    arguments: tuple[str, ...]
    selected: str = ""  # the columns of a nest with selections, which has no looped kernel

    def call_lines(self, chosen: str) -> list[str]:
        """The launch, under its condition; `chosen` is the variable of the kernel that the tile chooses."""
        kernel, lines = self.kernel.name, [f"tile = {self.tile}"]
        if self.looped:
            lines.append(f"{chosen} = {self.looped.name} if tile.is_looped else {self.kernel.name}")
            kernel = chosen
        lines.append(f"{kernel}[tile.grid({self.rows})]({', '.join((*self.arguments, '**tile.meta'))})")
        return [f"if {self.condition}:", *(f"    {line}" for line in lines)] if self.condition else lines

    @property
    def constants(self) -> list[str]:
        return [name.partition(":")[0] for name in self.parameters if "tl.constexpr" in name]

    @property
    def counts(self) -> str:
        """The argument of the decorator for numbers that differ from step to step: Triton compiles nothing anew."""
        found = [name for name in self.parameters if name in COUNTS]
        return f"(do_not_specialize=[{', '.join(map(repr, found))}])" if found else ""

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (self.kernel, self.looped) if self.looped else (self.kernel,)


@dataclass(frozen=True, slots=True)
class JointLaunch:
    """One launch of several nests: the first programs compute the first nest, and so on.

    if tl.program_id(0) < programs:
        _qk_rope_kv_store_rows(tl.program_id(0), qkv, ...)
    else:
        _qk_rope_kv_store_rows1(tl.program_id(0) - programs, qkv, ...)
    """

    name: str
    launches: tuple[Launch, Launch]
    own: OwnNames

    @property
    def numbers(self) -> list[tuple[str, str]]:
        """Parameters of both nests that are passed at run time, with their arguments."""
        found: dict[str, str] = {}
        for launch in self.launches:
            names = [name for name in launch.parameters if "tl.constexpr" not in name]
            found |= dict(zip(names, launch.arguments, strict=False))
        return list(found.items())

    @property
    def constants(self) -> list[str]:
        """Attrs and sizes of both nests that the kernel is compiled for."""
        names = (name for launch in self.launches for name in launch.constants)
        return list(dict.fromkeys(name for name in names if not _is_of_tile(name)))

    @property
    def kernel_lines(self) -> list[str]:
        programs = self.own("programs")
        tiles = [f"{name}_{i}" for i, one in enumerate(self.launches) for name in one.constants if _is_of_tile(name)]
        numbers = [name for name, _ in self.numbers]
        counts = [name for name in numbers if name in COUNTS] + [programs]
        constants = [f"{name}: tl.constexpr" for name in (*self.constants, *tiles)]
        return [
            f"@triton.jit(do_not_specialize=[{', '.join(map(repr, counts))}])",
            f"def {self.name}({', '.join([*numbers, programs, *constants])}):",
            f"    if tl.program_id(0) < {programs}:",
            f"        {self._call(0, 'tl.program_id(0)')}",
            "    else:",
            f"        {self._call(1, f'tl.program_id(0) - {programs}')}",
        ]

    def _call(self, number: int, program: str) -> str:
        launch = self.launches[number]
        names = [name.partition(":")[0] for name in launch.parameters]
        passed = [program, *(f"{name}_{number}" if _is_of_tile(name) else name for name in names)]
        return f"{launch.kernel.name}({', '.join(passed)})"

    @property
    def call_lines(self) -> list[str]:
        programs, tiles = self.own("programs"), [self.own(f"tile_{i}") for i in range(2)]
        lines = []
        for tile, launch in zip(tiles, self.launches, strict=True):
            lines += [*launch.setup, f"{tile} = {launch.tile}"]
        first, second = (f"{tile}.grid({one.rows})[0]" for tile, one in zip(tiles, self.launches, strict=True))
        blocks = [
            f"{name}_{i}={tiles[i]}.{'rows' if name == 'ROWS' else 'block'}"
            for i, one in enumerate(self.launches)
            for name in one.constants
            if _is_of_tile(name)
        ]
        constants = [f"{name}={name}" for name in self.constants]
        arguments = [*(text for _, text in self.numbers), programs, *constants, *blocks]
        warps = f"num_warps=max({tiles[0]}.num_warps, {tiles[1]}.num_warps)"
        count = self.own("num_programs")
        grid = f"({count}, max({tiles[0]}.num_blocks, {tiles[1]}.num_blocks))"
        arguments += [warps, "num_stages=1", "enable_fp_fusion=False"]
        lines += [f"{programs} = {first}", f"{count} = {programs} + {second}", f"if {count} > 0:"]
        return [*lines, f"    {self.name}[{grid}]({', '.join(arguments)})"]


def _is_of_tile(name: str) -> bool:
    return name == "ROWS" or name.startswith("BLOCK_")


@dataclass(frozen=True, slots=True)
class RowsView:
    """View of an op in `triton_rows.py.jinja`; `kernel` is the variable of a kernel that the tile chose."""

    op: OpDef
    setup: tuple[str, ...]  # sizes, long rows, outputs, operands as rows
    launches: tuple[Launch, ...]
    joint: JointLaunch | None
    result: str
    kernel: str

    @property
    def call_lines(self) -> list[str]:
        if self.joint is not None:
            return self.joint.call_lines
        return [line for one in self.launches for line in (*one.setup, *one.call_lines(self.kernel))]


def rows_view(op: OpDef, program: RowProgram, *, updates: bool) -> RowsView:
    """An op that `updates` its in-place outputs writes parts of them, so they are the inputs' memory."""
    own = own_names(op, program)
    is_joint = len(program.nests) == 2
    launches = [
        _launch(op, nest, own, f"{number or ''}", is_joint=is_joint) for number, nest in enumerate(program.nests)
    ]
    joint = JointLaunch(f"_{op.name}_kernel", (launches[0], launches[1]), own) if is_joint else None
    text = "\n".join(
        text for launch in launches for text in (launch.condition, launch.tile, *launch.setup, *launch.arguments)
    )
    outputs = [_allocation(op, output, updates=updates) for output in op.outputs]
    as_rows = [_as_rows(operand, own) for operand in (*op.inputs, *op.outputs) if LEADING in operand.type.dims]
    sizes = _sizes(op, "\n".join([text, *outputs, *as_rows]))
    return RowsView(
        op,
        (*sizes, *_long_rows(op, launches), *_dense(op, updates=updates), *outputs, *as_rows),
        tuple(launches),
        joint,
        ", ".join(o.name for o in op.outputs),
        own("kernel"),
    )


def sizes_and_operands(op: OpDef, own: OwnNames) -> list[str]:
    """Lines of a launcher: all sizes, outputs, and operands with leading dims as rows."""
    outputs = [_allocation(op, output, updates=False) for output in op.outputs]
    as_rows = [_as_rows(operand, own) for operand in (*op.inputs, *op.outputs) if LEADING in operand.type.dims]
    return [*_sizes(op, " ".join(op.symbols)), *_dense(op, updates=False), *outputs, *as_rows]


def _dense(op: OpDef, *, updates: bool) -> list[str]:
    """`x, w = dense(x, w)` for the inputs; those that the op updates must be what they are."""
    updated = set(op.inplace.values()) if updates else set()
    names = [o.name for o in op.inputs if o.type.dims and o.name not in updated]
    if not names:
        return []
    targets = f"({names[0]},)" if len(names) == 1 else ", ".join(names)
    return [f"{targets} = dense({', '.join(names)})"]


def _long_rows(op: OpDef, launches: Sequence[Launch]) -> list[str]:
    """Rows with selections, and those of joint launches, must fit in a tile: longer ones use the reference."""
    columns = dict.fromkeys(launch.selected for launch in launches if launch.selected)
    arguments = ", ".join([*(o.name for o in op.inputs), *(f"{attr.name}={attr.name}" for attr in op.attrs)])
    longest = next(iter(columns), "") if len(columns) < 2 else f"max({', '.join(columns)})"
    return [f"if {longest} > LONGEST_TILE:", f"    return reference_{op.name}({arguments})"] if longest else []


def _launch(op: OpDef, nest: Nest, own: OwnNames, suffix: str, *, is_joint: bool) -> Launch:
    """A nest of several that are launched together has rows that fit in a tile, as heads do."""
    whole = RowKernel(op, nest, own, whole=True, program=own("program") if is_joint else "tl.program_id(0)")
    is_looped = whole.has_reductions and not whole.selections and not is_joint
    looped = RowKernel(op, nest, own, whole=False) if is_looped else None
    text = "\n".join((*whole.lines, *(looped.lines if looped else ())))
    arguments = {key: value for key, value in arguments_of(op, own).items() if re.search(rf"\b{key}\b", text)}
    constants = [attr.name for attr in op.attrs if attr.type in CONSTANTS and attr.name in arguments]
    constants += [size for size in op.symbols if size in arguments and size not in COUNTS]
    numbers = [key for key in arguments if key not in constants]
    blocks = [block_name(loop) for loop in whole.loops]
    columns, setup = _columns(whole, own("columns"))
    return Launch(
        Kernel(f"_{op.name}_{'rows' if looped or is_joint else 'kernel'}{suffix}", tuple(whole.lines)),
        Kernel(f"_{op.name}_long{suffix}", tuple(looped.lines)) if looped else None,
        parameters=(*numbers, *(f"{name}: tl.constexpr" for name in (*constants, "ROWS", *blocks))),
        setup=setup,
        condition=_condition(whole, columns),
        rows=whole.rows_text,
        tile=f"{'row_tile' if whole.needs_rows else 'split_tile'}({columns}{'' if nest.rows else ', max_rows=1'})",
        arguments=(
            *(arguments[key] for key in numbers),
            *(f"{name}={name}" for name in constants),
            *_blocks(whole),
        ),
        selected=(setup[0].partition(" = ")[2] if setup else columns)
        if whole.selections or (is_joint and whole.needs_rows)
        else "",
    )


def _blocks(rows: RowKernel) -> list[str]:
    """The blocks of columns. The elements that a row selects are few, and have a block of their number."""
    tops = {step.k for step in rows.selections}
    sizes = {loop: f"triton.next_power_of_2({size_text(loop.extent)})" for loop in tops}
    return [f"{block_name(loop)}={sizes.get(loop, 'tile.block')}" for loop in rows.loops]


def _condition(rows: RowKernel, columns: str) -> str:
    """Whether the nest stores an element. A row whose reductions are over no elements is stored too."""
    stored = [sweep.loop for sweep in rows.nest.sweeps if any(isinstance(step, Store) for step in sweep.steps)]
    texts = dict.fromkeys(size_text(loop.extent) for loop in stored)
    if any(isinstance(step, Store) for step in rows.nest.steps):
        stored_columns = ""
    elif set(texts) == {size_text(loop.extent) for loop in rows.loops}:
        stored_columns = columns
    else:
        stored_columns = next(iter(texts)) if len(texts) == 1 else f"max({', '.join(texts)})"
    return " and ".join(f"{size} > 0" for size in (rows.rows_text, stored_columns) if size not in ("", "1"))


def _columns(rows: RowKernel, name: str) -> tuple[str, tuple[str, ...]]:
    """The most columns that a sweep has, and the line that names them if they are more than one symbol."""
    extents = list(dict.fromkeys(size_text(loop.extent) for loop in rows.loops)) or ["1"]
    if len(extents) == 1 and re.fullmatch(r"\w+", extents[0]):
        return extents[0], ()
    most = extents[0] if len(extents) == 1 else f"max({', '.join(extents)})"
    return name, (f"{name} = {most}",)


def arguments_of(op: OpDef, own: OwnNames) -> Mapping[str, str]:
    """Everything that can be passed to a kernel, by parameter: operands, attrs, sizes, strides."""
    found = {operand.name: _rows_name(operand, own) for operand in (*op.inputs, *op.outputs)}
    found |= {attr.name: attr.name for attr in op.attrs}
    found |= {symbol: symbol for symbol in (*op.symbols, "R")}
    for operand in (*op.inputs, *op.outputs):
        for axis in range(len(operand.type.dims) - 1):
            stride = f"{_rows_name(operand, own)}.stride({axis})"
            found[stride_name(operand, axis)] = (
                f"0 if {operand.name} is None else {stride}" if operand.optional else stride
            )
    return found


def _rows_name(operand: Operand, own: OwnNames) -> str:
    return own(f"{operand.name}_rows") if LEADING in operand.type.dims else operand.name


def _as_rows(operand: Operand, own: OwnNames) -> str:
    """`x_rows = x.reshape(R, *x.shape[-1:])`: the leading dims as one, without a copy where strides allow."""
    own_dims = len(operand.type.dims) - 1
    reshaped = f"{operand.name}.reshape(R{f', *{operand.name}.shape[-{own_dims}:]' if own_dims else ''})"
    none = f" if {operand.name} is not None else None" if operand.optional else ""
    return f"{_rows_name(operand, own)} = {reshaped}{none}"


def _allocation(op: OpDef, output: Operand, *, updates: bool) -> str:
    """`y = torch.empty(*x.shape[:-1], I, dtype=x.dtype, device=x.device)`, or `k_out = k_cache`."""
    if updates and output.name in op.inplace:
        return f"{output.name} = {op.inplace[output.name]}"
    leading = leading_text(op)
    sizes = ", ".join(f"*{leading}" if dim == LEADING else size_text(dim) for dim in output.type.dims) or "()"
    if output.type.dims == (LEADING,):  # torch.empty(*()) is an error
        sizes = leading
    element, device = output.type.element, op.inputs[0].name
    dtype = f"torch.{TORCH_DTYPES[element]}" if element in DTYPES else f"{op.element_inputs[element]}.dtype"
    return f"{output.name} = torch.empty({sizes}, dtype={dtype}, device={device}.device)"


def _sizes(op: OpDef, text: str) -> Sequence[str]:
    lines = dim_lines(op, [symbol for symbol in op.symbols if re.search(rf"(?<![.\w]){symbol}\b", text)])
    return [*lines, *([f"R = {leading_text(op)}.numel()"] if leading_text(op) else [])]
