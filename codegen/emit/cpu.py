"""Emits the CPU kernels: `kernels/cpu/norm.cpp` with one C++ function per op, and the table that a loader needs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sageLLM.codegen.emit.cpp_text import CPP_TYPES, CppText, cpp_name, size_text
from sageLLM.codegen.emit.cpu_product import ProductText, product_lines
from sageLLM.codegen.emit.cpu_table import Unpacks, unpacks_of
from sageLLM.codegen.emit.reference import by_stem
from sageLLM.codegen.expr.size import LEADING, Size, volume
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.expr.types import DTYPES, INTEGERS
from sageLLM.codegen.kernel.lower import row_program
from sageLLM.codegen.kernel.places import NotRows
from sageLLM.codegen.kernel.products import SUMS, Product, product_of
from sageLLM.codegen.kernel.rows import Fold, Index, Let, Loop, Nest, Reduction, RowProgram, Step, Store, Sweep
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import OpDef, Operand
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header
from sageLLM.codegen.schema.hardware import HardwareFile

FOLDER = "kernels/cpu"
FOLDER_OF_TEMPLATES = "cpu"
PACKED_OF_TEMPLATES: Mapping[str, Mapping[str, int]] = {"expert_linear": {"w": 1}}
"""The references that have a C++ template, and the weights that it reads packed, with their gates."""
_ATTR_TYPES = {"f32": "float", "i32": "int64_t", "bool": "bool", "str": "int64_t"}
_ACCUMULATORS = {"sum": "Sum", "mean": "Sum", "amax": "Max", "amin": "Min"}

_FOLDS = {"sum": ("Floats{}", "{0} += {1}"), "mean": ("Floats{}", "{0} += {1}"),
          "amax": ("lanes(-INFINITY)", "{0} = maximum({0}, {1})"),
          "amin": ("lanes(INFINITY)", "{0} = minimum({0}, {1})")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """One op: its C++ function, the sizes that its call begins with, and the gates of weights that it reads packed.

    `unpacks` is a second function, for a table that is packed as it is also the weight of a product.
    """

    op: OpDef
    lines: tuple[str, ...]
    sizes: tuple[str, ...]
    packed: Mapping[str, int]
    unpacks: Unpacks | None = None


def emit_cpu(specs: Specs, renderer: Renderer) -> list[Output]:
    """`kernels/cpu/STEM.cpp` for every ops file that has a kernel, and `kernels/cpu/__init__.py` with KERNELS."""
    own = [op for op in specs.ops.values() if not specs.raw.is_base(op.entry)]
    hardware = specs.hardware.get("cpu")
    has_products = hardware is not None and hardware.spec.products is not None
    modules = {
        stem: kernels
        for stem, ops in by_stem(own).items()
        if (kernels := cpu_kernels(ops, specs.ops, renderer, has_products=has_products))
    }
    outputs = [_source(stem, kernels, hardware, renderer) for stem, kernels in modules.items()]
    text = renderer.render("cpu/registry.py.jinja", modules=modules)
    entries = tuple(kernel.op.ref for kernels in modules.values() for kernel in kernels)
    return [*outputs, Output(f"{FOLDER}/__init__.py", header("specs/ops", "rms_norm") + text, entries)]


def cpu_kernels(
    ops: Sequence[OpDef], every: Mapping[str, OpDef], renderer: Renderer, *, has_products: bool
) -> list[CpuKernel]:
    """The kernels of those of the ops that have one; products need the block sizes of a machine."""
    found = [kernel for op in ops if (kernel := _kernel(op, every, renderer))]
    return [kernel for kernel in found if has_products or not kernel.packed]


def _kernel(op: OpDef, every: Mapping[str, OpDef], renderer: Renderer) -> CpuKernel | None:
    if op.reference is not None:
        return _templated(op, op.entry.spec.reference or "", renderer)
    product = product_of(op, every)
    if product is not None:
        lines = CppKernel(op, RowProgram((product.finish,))).product_lines(product)
        return CpuKernel(op, lines, sizes_of(op), {product.w.name: product.gates})
    try:
        lines = CppKernel(op, row_program(op, every)).lines()
    except NotRows:
        return None
    unpacks = unpacks_of(op)
    if unpacks:
        unpacks = Unpacks(unpacks.table, (*declarations(op, "\n".join(unpacks.lines)), *unpacks.lines))
    return CpuKernel(op, lines, sizes_of(op), {}, unpacks)


def _templated(op: OpDef, name: str, renderer: Renderer) -> CpuKernel | None:
    """The op by the C++ template of the same name as its reference, if there is one."""
    if name not in PACKED_OF_TEMPLATES:
        return None
    body = renderer.render(f"{FOLDER_OF_TEMPLATES}/{name}.cpp.jinja", op=op).splitlines()
    return CpuKernel(op, (*declarations(op, "\n".join(body)), *body), sizes_of(op), PACKED_OF_TEMPLATES[name])


def _source(
    stem: str, kernels: Sequence[CpuKernel], hardware: Entry[HardwareFile] | None, renderer: Renderer
) -> Output:
    variables = dict.fromkeys(name for kernel in kernels for name in _variables(kernel.op))
    text = renderer.render(
        "cpu/kernels.cpp.jinja",
        kernels=kernels,
        variables=variables,
        source=kernels[0].op.entry.doc.file,
        header=_header_of(kernels),
        hardware=hardware if any(kernel.packed for kernel in kernels) else None,
    )
    return Output(f"{FOLDER}/{stem}.cpp", text, tuple(kernel.op.ref for kernel in kernels))


def _header_of(kernels: Sequence[CpuKernel]) -> str:
    if any(kernel.packed for kernel in kernels):
        return "products.h"
    return "packed.h" if any(kernel.unpacks for kernel in kernels) else "sage.h"


def _variables(op: OpDef) -> list[str]:
    """The element variables of the op's operands."""
    return [o.type.element for o in (*op.inputs, *op.outputs) if o.type.element not in DTYPES]


def sizes_of(op: OpDef) -> tuple[str, ...]:
    """R if there are leading dims, then the op's dims."""
    has_leading = any(LEADING in o.type.dims for o in (*op.inputs, *op.outputs))
    return (*(("R",) if has_leading else ()), *op.symbols)


def stride_names(operand: Operand) -> list[str]:
    """`x_T`, `x_N` for E[T, N, D]; the stride of a compound dim has its place as its name."""
    return [f"{operand.name}_{_stride_suffix(place, dim)}" for place, dim in enumerate(operand.type.dims[:-1])]


def _stride_suffix(place: int, dim: Size) -> str:
    return "R" if dim == LEADING else dim.name or f"D{place}"


class CppKernel:
    """Writes the function of one op, line by line."""

    def __init__(self, op: OpDef, program: RowProgram) -> None:
        self.op, self.program = op, program
        self.operands = {o.name: stride_names(o) for o in (*op.inputs, *op.outputs)}
        self.optional = {o.name: cpp_name(o.name) for o in op.inputs if o.optional}
        self.optional |= {attr.name: f"{attr.name}Given" for attr in op.attrs if attr.optional}
        self.names = {o.name: f"{o.name}Value" for o in op.outputs}

    def lines(self) -> tuple[str, ...]:
        body = [line for nest in self.program.nests for line in self._nest(nest)]
        return (*declarations(self.op, "\n".join(body)), *body)

    def product_lines(self, product: Product) -> tuple[str, ...]:
        """The function of an op that is a product: the sweep along a row is what becomes of a block of sums."""
        self.operands[SUMS] = [""] * (len(product.finish.rows))
        loop = product.sweep.loop
        writer = ProductText(self.operands, {}, self.optional, self.names, loop, set(), product)
        inside = [line for step in product.sweep.steps for line in self._in_sweep(step, writer)]
        body = product_lines(product, writer, inside)
        return (*declarations(self.op, "\n".join(body)), *body)

    def _text(self, loop: Loop | None = None, lanes: set[str] | None = None) -> CppText:
        return CppText(self.operands, {}, self.optional, self.names, loop, lanes if lanes is not None else set())

    def _nest(self, nest: Nest) -> list[str]:
        inside = [line for step in nest.steps for line in self._step(step)]
        if not nest.rows:
            return ["{", *_indented(inside), "}"]
        swept = dict.fromkeys(sweep.loop.extent for sweep in nest.sweeps)
        rows = [loop.extent for loop in nest.rows]
        elements = size_text(volume(rows) * (sum(swept, Size.of(0)) if swept else Size.of(1)))
        name = nest.rows[0].variable if len(rows) == 1 else "iRow"
        positions = [f"const int64_t {', '.join(_positions(nest.rows))};"] if len(rows) > 1 else []
        start = f"each_row({size_text(volume(rows))}, {elements}, [&](int64_t {name}) {{"
        return [start, *_indented([*positions, *inside]), "});"]

    def _step(self, step: Step) -> list[str]:
        writer = self._text()
        match step:
            case Index(variable=variable, value=value):
                return [f"const int64_t {variable} = {writer.text(value)};"]
            case Let(name=name, value=value):
                return [f"const {_row_type(value)} {self.names.get(name, cpp_name(name))} = {writer.text(value)};"]
            case Store(place=place, value=value):
                at, _ = writer.address(place)
                return [f"put({at}, {writer.text(value)});"]
        return self._sweep(step)

    def _sweep(self, sweep: Sweep) -> list[str]:
        writer = self._text(sweep.loop, set())
        reductions = [step for step in sweep.steps if isinstance(step, Reduction)]
        before = [f"{_ACCUMULATORS[one.op]} {one.name}All;" for one in reductions]
        after = [f"const float {one.name} = {self._total(one, sweep.loop)};" for one in reductions]
        inside = [line for step in sweep.steps for line in self._in_sweep(step, writer)]
        start = f"sweep({size_text(sweep.loop.extent)}, [&](auto {sweep.loop.variable}) {{"
        return [*before, start, *_indented(inside), "});", *after]

    def _total(self, reduction: Reduction, loop: Loop) -> str:
        total = f"{reduction.name}All.total()"
        return f"{total} / {_as_float(loop.extent)}" if reduction.op == "mean" else total

    def _in_sweep(self, step: Step | Fold | Reduction, writer: CppText) -> list[str]:
        match step:
            case Let(name=name, value=value):
                text = writer.text(value)
                if writer.is_lanes(value):
                    writer.lanes.add(name)
                return [f"const auto {self.names.get(name, cpp_name(name))} = {text};"]
            case Reduction(name=name, value=value):
                return [f"{name}All.add({writer.text(value)}, {writer.loop.variable if writer.loop else ''});"]
            case Store(place=place, value=value):
                at, by = writer.address(place)
                where = f"{at}, {writer.loop.variable if writer.loop else ''}"
                return [f"store({where}, {writer.text(value)});" if by == "1" else
                        f"store_every({by}, {where}, {writer.text(value)});"]  # fmt: skip
            case Fold():
                return self._fold(step, writer)
        raise AssertionError(f"a sweep holds no {type(step).__name__}")

    def _fold(self, fold: Fold, writer: CppText) -> list[str]:
        writer.lanes.add(fold.name)
        start, combine = _FOLDS[fold.op]
        name, extent = fold.loop.variable, size_text(fold.loop.extent)
        lines = [
            f"Floats {fold.name} = {start};",
            f"for (int64_t {name} = 0; {name} < {extent}; ++{name}) {{",
            *_indented([combine.format(fold.name, writer.text(fold.value)) + ";"]),
            "}",
        ]
        return [*lines, f"{fold.name} /= {_as_float(fold.loop.extent)};"] if fold.op == "mean" else lines


def declarations(op: OpDef, body: str) -> list[str]:
    """Names for those of the arguments that the body uses: sizes, operands, strides, attrs."""
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
        if attr.type == "dim":
            continue
        if _mentions(body, cpp_name(attr.name)):
            lines.append(
                f"const {_ATTR_TYPES[attr.type]} {cpp_name(attr.name)} = ({_ATTR_TYPES[attr.type]})attrs[{place}];"
            )
        if _mentions(body, f"{attr.name}Given"):
            lines.append(f"const bool {attr.name}Given = attrs[{place}] == attrs[{place}];")
    return lines


def _positions(rows: Sequence[Loop]) -> list[str]:
    """`iT = iRow / N`, `iN = iRow % N`."""
    found = []
    for number, loop in enumerate(rows):
        inner = size_text(volume(other.extent for other in rows[number + 1 :]))
        text = "iRow" if number == len(rows) - 1 else f"iRow / {inner if inner.isidentifier() else f'({inner})'}"
        extent = size_text(loop.extent)
        wraps = f" % {extent if extent.isidentifier() else f'({extent})'}" if number else ""
        found.append(f"{loop.variable} = {text}{wraps}")
    return found


def _as_float(size: Size) -> str:
    text = size_text(size)
    return f"(float){text}" if text.isidentifier() else f"(float)({text})"


def _row_type(value: Expr) -> str:
    element = value.type.element
    return "bool" if element in ("bool", "truth") else "int64_t" if element in (*INTEGERS, "int") else "float"


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _mentions(text: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", text) is not None
