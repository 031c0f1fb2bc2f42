"""Emits the CPU kernels: `kernels/cpu/norm.cpp` with one C++ function per op, and the table for the loader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sageLLM.codegen.contents import Contents, Row, refs
from sageLLM.codegen.emit.cpp_arguments import OperandText, declarations, presence_name, sizes_of, stride_names
from sageLLM.codegen.emit.cpp_rows import CppKernel
from sageLLM.codegen.emit.cpp_text import CppText, cpp_name
from sageLLM.codegen.emit.cpu_gemm import EPILOGUE
from sageLLM.codegen.emit.cpu_table import Unpacks, unpacks_of
from sageLLM.codegen.expr.size import Size, formula
from sageLLM.codegen.expr.tree import Expr, IfPresent, Ref
from sageLLM.codegen.expr.types import DTYPES
from sageLLM.codegen.kernel.epilogue import FusedEpilogue, fused_epilogue_of
from sageLLM.codegen.kernel.gemm import gemm_of
from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.lower import row_program, why_not_lowered
from sageLLM.codegen.kernel.mask import MaskBounds, mask_bounds
from sageLLM.codegen.kernel.names import own_names
from sageLLM.codegen.kernel.parts import OutputPart, output_parts
from sageLLM.codegen.kernel.reduced import reduced_rows_of
from sageLLM.codegen.kernel.rows import RowProgram
from sageLLM.codegen.kernel.scatter import cache_names, is_scattered
from sageLLM.codegen.load import Entry
from sageLLM.codegen.model.op import OpDef, Reference
from sageLLM.codegen.model.specs import Specs
from sageLLM.codegen.render import Output, Renderer, header, lit
from sageLLM.codegen.schema.hardware import HardwareFile

FOLDER = "kernels/cpu"
PACKED_OF_TEMPLATES: Mapping[str, Mapping[str, int]] = {"expert_linear": {"w": 1}}
"""References with a C++ template that reads weights packed, and those weights with their gates."""

HEADERS_BY_TAG: Mapping[str, str] = {"collective": "communicator.h", "p2p": "point_to_point.h"}


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """The C++ function of an op, the leading sizes of its call, and the facts that the loader needs.

    `packed` has the gates of the weights that it reads packed, `parts` its outputs if they are parts of inputs.
    `unpacks` is a second function, for a table that is packed because it is also the weight of a GEMM.
    """

    op: OpDef
    lines: tuple[str, ...]
    sizes: tuple[str, ...]
    updates: bool = False
    packed: Mapping[str, int] = field(default_factory=dict)
    parts: dict[str, OutputPart] | None = None
    unpacks: Unpacks | None = None

    @property
    def entry(self) -> str:
        """`NativeKernel(RmsNorm, "norm.cpp", ("R", "H"))`, as in the table."""
        arguments = [self.op.class_name, lit(f"{self.op.stem}.cpp"), lit(self.sizes)]
        arguments += ["updates=True"] if self.updates else []
        arguments += [f"caches={lit(caches)}"] if (caches := cache_names(self.op)) else []
        arguments += [f"packed={lit(dict(self.packed))}"] if self.packed else []
        arguments += [f"unpacks={lit(self.unpacks.table)}"] if self.unpacks else []
        if self.parts is not None:
            parts = ", ".join(f"{lit(name)}: {_part_text(part)}" for name, part in self.parts.items())
            arguments.append(f"parts={{{parts}}}")
        return f"NativeKernel({', '.join(arguments)})"

    @property
    def symbols(self) -> set[str]:
        """The sizes and strides that the formulas of `parts` use."""
        found = [size for part in (self.parts or {}).values() for size in _sizes_of_part(part)]
        return {symbol for size in found for symbol in size.symbols}

    @property
    def row(self) -> Row:
        """The facts for the table."""
        op = self.op
        names = {"name": op.name, "class_name": op.class_name, "ref": op.ref}
        return names | {"entry": self.entry, "symbols": sorted(self.symbols)}


def _part_text(part: OutputPart) -> str:
    where = [f"({formula(a)}, {formula(b)})" for a, b in part.where]
    strides = _tuple_text([formula(size) for size in part.strides])
    condition = f", {_tuple_text(where)}" if where else ""
    return f"Part({lit(part.base)}, {formula(part.offset)}, {strides}{condition})"


def _tuple_text(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def _sizes_of_part(part: OutputPart) -> list[Size]:
    return [part.offset, *part.strides, *(size for pair in part.where for size in pair)]


def emit_cpu(ops: Sequence[OpDef], specs: Specs, renderer: Renderer, programs: Programs) -> list[Output]:
    """`kernels/cpu/STEM.cpp` for one ops file, if one of its ops has a kernel."""
    hardware = specs.hardware.get("cpu")
    has_gemm = hardware is not None and hardware.spec.gemm is not None
    kernels = cpu_kernels(ops, programs, renderer, has_gemm=has_gemm)
    return [_source(ops[0].stem, kernels, hardware, renderer)] if kernels else []


def emit_cpu_table(contents: Contents, renderer: Renderer) -> list[Output]:
    """`kernels/cpu/__init__.py` with KERNELS."""
    modules = contents.rows_by_stem(f"{FOLDER}/{{}}.cpp")
    every = [row for rows in modules.values() for row in rows]
    symbols = sorted({symbol for row in every for symbol in row["symbols"]})
    has_parts = any("Part(" in row["entry"] for row in every)
    text = renderer.render("cpu/registry.py.jinja", modules=modules, symbols=symbols, has_parts=has_parts)
    return [Output(f"{FOLDER}/__init__.py", header("specs/ops", "rms_norm") + text, refs(every))]


def cpu_kernels(ops: Sequence[OpDef], programs: Programs, renderer: Renderer, *, has_gemm: bool) -> list[CpuKernel]:
    """The kernels of those of the ops that have one; GEMMs need the block sizes of a machine."""
    found = [kernel for op in ops if (kernel := cpu_kernel(op, programs, renderer))]
    return [kernel for kernel in found if has_gemm or not kernel.packed]


def why_no_cpu_kernel(op: OpDef, programs: Programs, renderer: Renderer, *, has_gemm: bool) -> str | None:
    """The reason why an op has no C++ kernel, or None if it has one."""
    if op.reference is not None and _template_of(op.reference, renderer) is not None:
        return None
    fused = fused_epilogue_of(op, programs)
    consumer = fused.consumer.reference if fused is not None else None
    is_fused = consumer is not None and _template_of(consumer, renderer) is not None
    if is_fused or gemm_of(op, programs) is not None:
        return None if has_gemm else "a GEMM requires `gemm` in hardware/cpu.yaml"
    return None if reduced_rows_of(op, programs) is not None else why_not_lowered(op, programs)


def cpu_kernel(op: OpDef, programs: Programs, renderer: Renderer) -> CpuKernel | None:
    """The kernel from the template of its reference, or from its equations; None without either."""
    lines = _template_lines(op, renderer) if op.reference is not None else None
    if lines is not None:
        packed = PACKED_OF_TEMPLATES.get(op.entry.spec.reference or "", {})
        return CpuKernel(op, lines, sizes_of(op), updates=bool(op.inplace), packed=packed)
    fused = fused_epilogue_of(op, programs)
    if fused is not None and (rest := _consumer_lines(fused, renderer)):
        lines = CppKernel(op, fused.gemm.loops).fused_lines(fused, rest)
        return CpuKernel(op, lines, sizes_of(op), packed={fused.gemm.w.name: fused.gemm.gates})
    reduced = reduced_rows_of(op, programs)
    if reduced is not None:
        return CpuKernel(op, CppKernel(op, reduced.rest).reduced_lines(reduced), sizes_of(op))
    gemm = gemm_of(op, programs)
    if gemm is not None:
        lines = CppKernel(op, gemm.loops).gemm_lines(gemm)
        return CpuKernel(op, lines, sizes_of(op), packed={gemm.w.name: gemm.gates})
    try:
        program = row_program(op, programs)
    except LoweringError:
        return None
    updates, parts = is_scattered(op, programs.ops), _parts(op, program)
    lines = CppKernel(op, program).lines()
    return CpuKernel(op, lines, sizes_of(op), updates=updates, parts=parts, unpacks=_unpacks(op))


def _unpacks(op: OpDef) -> Unpacks | None:
    found = unpacks_of(op)
    if found is None:
        return None
    arguments = declarations(op, own_names(op), "\n".join(found.lines), packed={found.table})
    return Unpacks(found.table, (*arguments, *found.lines))


def _parts(op: OpDef, program: RowProgram) -> dict[str, OutputPart] | None:
    operands = (*op.inputs, *op.outputs)
    strides = {o.name: (*map(Size.symbol, stride_names(o)), Size.of(1))[: len(o.type.dims)] for o in operands}
    return output_parts(program, strides)


def _source(
    stem: str, kernels: Sequence[CpuKernel], hardware: Entry[HardwareFile] | None, renderer: Renderer
) -> Output:
    variables = dict.fromkeys(name for kernel in kernels for name in _variables(kernel.op))
    text = renderer.render(
        "cpu/kernels.cpp.jinja",
        kernels=kernels,
        variables=variables,
        source=kernels[0].op.entry.doc.file,
        headers=_headers_of(kernels),
        hardware=hardware if any(kernel.packed for kernel in kernels) else None,
        is_packed=any(kernel.packed or kernel.unpacks for kernel in kernels),
        has_caches=any(cache_names(kernel.op) for kernel in kernels),
    )
    rows = tuple(kernel.row for kernel in kernels)
    return Output(f"{FOLDER}/{stem}.cpp", text, refs(rows), rows)


def _headers_of(kernels: Sequence[CpuKernel]) -> list[str]:
    """The headers that the kernels need, in the order of clang-format."""
    tags = {tag for kernel in kernels for tag in kernel.op.tags}
    headers = [HEADERS_BY_TAG[tag] for tag in HEADERS_BY_TAG if tag in tags]
    if any(kernel.packed for kernel in kernels):
        headers.append("gemm.h")
    elif any(kernel.unpacks for kernel in kernels):
        headers.append("coded.h")
    return sorted({*headers, "sage.h"})


def _variables(op: OpDef) -> list[str]:
    """The element variables of the op's operands."""
    return [o.type.element for o in (*op.inputs, *op.outputs) if o.type.element not in DTYPES]


# ops that are defined by a reference


def _template_lines(op: OpDef, renderer: Renderer) -> tuple[str, ...] | None:
    """The op's template with its operands and hooks filled in, or None without a template for the CPU."""
    assert op.reference is not None, "only ops with a reference have a template"
    template = _template_of(op.reference, renderer)
    if template is None:
        return None
    own = own_names(op)
    hooks = {hook.name: hook.value for hook in op.reference.hooks}
    presence = {attr.name: presence_name(attr, own) for attr in op.attrs if attr.optional}
    bounds = mask_bounds(hooks["mask_mod"]) if "mask_mod" in hooks else None
    text = renderer.render(
        template,
        op=op,
        operands=[OperandText.of(o) for o in (*op.inputs, *op.outputs)],
        bounds=_bound_lines(bounds, presence) if bounds else [],
        is_range="true" if bounds and bounds.is_exact else "false",
        modifies_scores=_modifies_scores(hooks["score_mod"], presence) if "score_mod" in hooks else "false",
        epilogue="",
        **{name: hook_text(presence, value) for name, value in hooks.items()},
    )
    body = [line for line in text.splitlines() if line.strip()]
    packed = PACKED_OF_TEMPLATES.get(op.entry.spec.reference or "", {})
    return (*declarations(op, own, "\n".join(body), integer="int32_t", packed=packed), *body)


def _consumer_lines(fused: FusedEpilogue, renderer: Renderer) -> list[str]:
    """The consumer's work when all rows are complete, from its template; empty if it has none for the CPU."""
    assert fused.consumer.reference is not None, "a consumer has a reference"
    template = _template_of(fused.consumer.reference, renderer)
    if template is None:
        return []
    operands = [OperandText.of(o) if o else "nullptr" for o in fused.operands]
    text = renderer.render(template, op=fused.consumer, operands=operands, epilogue=EPILOGUE)
    return [line for line in text.splitlines() if line.strip()]


def _template_of(reference: Reference, renderer: Renderer) -> str | None:
    template = reference.template.replace("reference/", "cpu/").replace(".py.", ".cpp.")
    return template if renderer.find(template) is not None else None


def hook_text(presence: Mapping[str, str], value: Expr) -> str:
    """A hook as C++: `score` and `n` have a lane per key, `m` and `h` belong to the row."""
    writer = CppText({}, presence, {}, None, {"score", "n"}, integer="int32_t")
    text = writer.text(value)
    if writer.is_lanes(value):
        return text
    return f"broadcast({text})" if writer.is_float(value) else f"mask({text})"


def _modifies_scores(score_mod: Expr, presence: Mapping[str, str]) -> str:
    """The condition, in C++, under which the hook changes scores."""
    match score_mod:
        case Ref(name="score"):
            return "false"
        case IfPresent(name=name, b=Ref(name="score")):
            return presence[name]
    return "true"


def _bound_lines(bounds: MaskBounds, presence: Mapping[str, str]) -> list[str]:
    lines = []
    if bounds.is_causal:
        lines.append("keys.stop = minimum(keys.stop, last + 1);")
    if bounds.causal_attr:
        lines.append(f"if ({cpp_name(bounds.causal_attr)}) keys.stop = minimum(keys.stop, last + 1);")
    for window in bounds.windows:
        attr, condition = cpp_name(window.attr), presence[window.attr]
        lines.append(f"if ({condition}) keys.first = maximum(keys.first, first - {attr} + 1);")
        if window.is_symmetric:
            lines.append(f"if ({condition}) keys.stop = minimum(keys.stop, last + {attr});")
    for chunk in bounds.chunks:
        lines.append(f"if ({presence[chunk]}) keys.first = maximum(keys.first, first - first % {cpp_name(chunk)});")
    return lines
