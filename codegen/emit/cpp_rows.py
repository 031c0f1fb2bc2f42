"""Writes row programs as C++: loops over rows, sweeps along them, in terms of `runtime/kernels/cpu/sage.h`."""

import re
from collections.abc import Sequence
from dataclasses import replace

from sageLLM.codegen.contents import class_name
from sageLLM.codegen.emit.cpp_arguments import CACHE, declarations, presence_name, stride_names
from sageLLM.codegen.emit.cpp_text import CppText, cpp_name, size_text
from sageLLM.codegen.emit.cpu_gemm import (
    GemmText,
    computed_rows_lines,
    fused_lines,
    gemm_lines,
    indented,
    scratch_lines,
    scratch_strides,
)
from sageLLM.codegen.expr.size import Size, volume
from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.expr.types import INTEGERS
from sageLLM.codegen.kernel.epilogue import FusedEpilogue
from sageLLM.codegen.kernel.gemm import SUMS, Gemm
from sageLLM.codegen.kernel.names import own_names, selection_names
from sageLLM.codegen.kernel.prologue import Prologue, within_row
from sageLLM.codegen.kernel.reduce_first import reduce_first
from sageLLM.codegen.kernel.reduced import ReducedRows
from sageLLM.codegen.kernel.rows import (
    Affine,
    Fold,
    Index,
    InSweep,
    Let,
    Loop,
    Nest,
    Reduction,
    RowProgram,
    Running,
    Selection,
    Step,
    Store,
    Sweep,
)
from sageLLM.codegen.kernel.scatter import is_cache
from sageLLM.codegen.model.op import OpDef

_ACCUMULATORS = {"sum": "Sum", "mean": "Sum", "amax": "Max", "amin": "Min", "cumsum": "CumSum", "cumprod": "CumProd",
                 "cummax": "CumMax", "cummin": "CumMin"}  # fmt: skip
_FOLDS = {"sum": ("Floats{}", "{0} += {1}"), "mean": ("Floats{}", "{0} += {1}"),
          "amax": ("broadcast(-INFINITY)", "{0} = maximum({0}, {1})"),
          "amin": ("broadcast(INFINITY)", "{0} = minimum({0}, {1})")}  # fmt: skip
_INTEGER_FOLDS = {"sum": ("{1}(0)", "{0} = add({0}, {1})"), "amax": ("{1}(INT{0}_MIN)", "{0} = maximum({0}, {1})"),
                  "amin": ("{1}(INT{0}_MAX)", "{0} = minimum({0}, {1})")}  # fmt: skip


MAX_CACHE_ROWS = 2
"""The rows of caches that a kernel may write at the same time: the slots of `KV_ROWS` in `scratch.h`."""


class CppKernel:
    """Writes the function of one op, line by line."""

    def __init__(self, op: OpDef, program: RowProgram) -> None:
        self.op, self.program = op, program
        self.own = own_names(op, program)
        self.operands = {o.name: stride_names(o) for o in (*op.inputs, *op.outputs)}
        self.selections = {name: self.own(f"{name}_acc") for name in selection_names(program)}
        self.optional = {o.name: cpp_name(o.name) for o in op.inputs if o.optional}
        self.optional |= {attr.name: presence_name(attr, self.own) for attr in op.attrs if attr.optional}
        self.names = {o.name: self.own(f"{o.name}_value") for o in op.outputs}
        self.caches = {o.name: o for o in op.outputs if is_cache(o)}
        self.num_operands = len(self.operands)

    def lines(self) -> tuple[str, ...]:
        body = [line for nest in self.program.nests for line in self._nest(nest)]
        return (*declarations(self.op, self.own, "\n".join(body)), *body)

    def reduced_lines(self, reduced: ReducedRows) -> tuple[str, ...]:
        """The function of an op that begins with a sum over ranks: the rest of each row follows its sum."""
        nest = reduced.rest.nests[0]
        operands = [cpp_name(reduced.partial.name), *stride_names(reduced.partial)]
        operands += [cpp_name(reduced.total.name), *stride_names(reduced.total)]
        operands += [size_text(dim) for dim in reduced.partial.type.dims]
        start = f"all_reduce_rows({', '.join(operands)}, [&](int64_t {nest.rows[0].variable}) {{"
        inside = [line for step in nest.steps for line in self._step(step)]
        body = [start, *indented(inside), "});"]
        return (*declarations(self.op, self.own, "\n".join(body)), *body)

    def gemm_lines(self, gemm: Gemm) -> tuple[str, ...]:
        """The function of an op that is a GEMM: the sweep along a row is the epilogue of a block of sums."""
        writer = self._gemm_text(gemm)
        if gemm.prologue and gemm.prologue.in_scratch and not gemm.groups:
            body = computed_rows_lines(gemm, self._row_lines(gemm, gemm.prologue), self._epilogue(writer, gemm))
        else:
            body = [*self._prologue(gemm), *gemm_lines(gemm, writer, self._epilogue(writer, gemm))]
        return (*declarations(self.op, self.own, "\n".join(body), packed={gemm.w.name}), *body)

    def fused_lines(self, fused: FusedEpilogue, rest: Sequence[str]) -> tuple[str, ...]:
        """The function of a GEMM and its consumer; `rest` is the consumer's work when all rows are complete."""
        gemm, epilogue = fused.gemm, f"{class_name(fused.consumer.entry.spec.reference or '')}Epilogue"
        writer = self._gemm_text(gemm, fused.result.name)
        lines = fused_lines(gemm, writer, self._epilogue(writer, gemm), epilogue)
        body = [*self._prologue(gemm), *lines, *rest]
        return (*declarations(self.op, self.own, "\n".join(body), packed={gemm.w.name}), *body)

    def _gemm_text(self, gemm: Gemm, consumed: str = "") -> GemmText:
        self.operands[SUMS] = [""] * (len(gemm.epilogue.rows))
        if gemm.prologue and gemm.prologue.in_scratch:
            self.operands[gemm.x.name] = scratch_strides(gemm.x)
            self.names[gemm.x.name] = self.own(f"{gemm.x.name}_value")
        return GemmText(self.operands, self.optional, self.names, gemm.sweep.loop, set(), gemm=gemm, consumed=consumed)

    def _prologue(self, gemm: Gemm) -> list[str]:
        """The loop over all rows before the product, with scratch memory for its result."""
        if gemm.prologue is None:
            return []
        return [*(scratch_lines(gemm.x) if gemm.prologue.in_scratch else []), *self._nest(gemm.prologue.nest)]

    def _row_lines(self, gemm: Gemm, prologue: Prologue) -> list[str]:
        """The prologue of one row, which is stored to a pointer to that row."""
        self.operands[gemm.x.name] = []
        return [line for step in within_row(prologue.nest.steps, gemm.x.name) for line in self._step(step)]

    def _epilogue(self, writer: GemmText, gemm: Gemm) -> list[str]:
        return [line for step in gemm.sweep.steps for line in self._in_sweep(step, writer)]

    def _text(self, loop: Loop | None = None, lanes: set[str] | None = None) -> CppText:
        found = lanes if lanes is not None else set()
        return CppText(self.operands, self.optional, self.names, loop, found, selections=self.selections)

    def _nest(self, nest: Nest) -> list[str]:
        if not nest.rows:
            return ["{", *indented(self._row(nest.steps)), "}"]
        swept = dict.fromkeys(sweep.loop.extent for sweep in nest.sweeps)
        rows = [loop.extent for loop in nest.rows]
        elements = size_text(volume(rows) * (sum(swept, Size.of(0)) if swept else Size.of(1)))
        name = nest.rows[0].variable if len(rows) == 1 else self.own("row")
        positions = [f"const int64_t {', '.join(_positions(nest.rows, name))};"] if len(rows) > 1 else []
        arguments = f"{size_text(volume(rows))}, {elements}, [=](int64_t {name}"
        parts = reduce_first(nest)
        if parts is None:
            return [f"parallel_for_rows({arguments}) {{", *indented([*positions, *self._row(nest.steps)]), "});"]
        value = self._name(parts.value)
        reduce, finish = self._row(parts.reduce), self._row(parts.finish)
        return [
            f"parallel_for_reduced_rows({arguments}) {{", *indented([*positions, *reduce, f"return {value};"]),
            f"}}, [=](int64_t {name}, float {value}) {{", *indented([*positions, *finish]), "});"]  # fmt: skip

    def _row(self, steps: Sequence[Step]) -> list[str]:
        """The steps of one row, without positions that none of them uses."""
        lines = [line for step in steps for line in self._step_with_cache_rows(step)]
        unused = [step.variable for step in steps if isinstance(step, Index)
                  and not re.search(rf"\b{step.variable}\b(?! =)", "\n".join(lines))]  # fmt: skip
        return [line for line in lines if not line.startswith(tuple(f"const int64_t {one} = " for one in unused))]

    def _step_with_cache_rows(self, step: Step) -> list[str]:
        """The step, and before it the rows of the caches that it is the first one to store to."""
        lines = []
        stores = [one for one in (step.steps if isinstance(step, Sweep) else ()) if isinstance(one, Store)]
        for location in (one.location for one in stores):
            row = self.own(f"{location.operand}_row")
            if location.operand in self.caches and f"{row}.at" not in self.operands:
                cache, number = self.caches[location.operand], len(self.operands) - self.num_operands
                assert number < MAX_CACHE_ROWS, f"{self.op.name} must store to at most {MAX_CACHE_ROWS} caches"
                at, _ = self._text().address(replace(location, index=(*location.index[:-1], Affine(Size.of(0)))))
                width = size_text(cache.type.dims[-1])
                lines.append(f"const KvRow<{cache.type.element}, {CACHE}> {row}({at}, {width}, {number});")
                self.operands[f"{row}.at"] = []
        for name in self.caches:
            step = within_row(step, name, f"{self.own(f'{name}_row')}.at")
        return [*lines, *self._step(step)]

    def _step(self, step: Step) -> list[str]:
        writer = self._text()
        match step:
            case Index(variable=variable, value=value):
                return [f"const int64_t {variable} = {replace(writer, is_index=True).text(value)};"]
            case Let(name=name, value=value):
                return [f"const {_row_type(value)} {self._name(name)} = {writer.text(value)};"]
            case Store(location=location, value=value):
                at, _ = writer.address(location)
                return [f"store_element({at}, {writer.text(value)});"]
        return self._sweep(step)

    def _sweep(self, sweep: Sweep) -> list[str]:
        writer = self._text(sweep.loop, set())
        reductions = [step for step in sweep.steps if isinstance(step, Reduction)]
        running = [step for step in sweep.steps if isinstance(step, Running)]
        selections = [step for step in sweep.steps if isinstance(step, Selection)]
        counted: list[Reduction | Running] = [*reductions, *running]
        before = [f"{_accumulator(one)} {self._acc(one)};" for one in counted]
        before += [f"{_selection_type(one)} {self._acc(one)}({size_text(one.k.extent)});" for one in selections]
        after = [
            f"const {_row_type(one.value)} {self._name(one.name)} = {self._total(one, sweep.loop)};"
            for one in reductions
        ]
        inside = [line for step in sweep.steps for line in self._in_sweep(step, writer)]
        after += [f"{self._acc(one)}.finish();" for one in selections]
        start = f"sweep({size_text(sweep.loop.extent)}, [&](auto {sweep.loop.variable}) {{"
        return [*before, start, *indented(inside), "});", *after]

    def _name(self, name: str) -> str:
        """The name of a value in C++."""
        return self.names.get(name, cpp_name(name))

    def _total(self, reduction: Reduction, loop: Loop) -> str:
        total = f"{self._acc(reduction)}.total()"
        if reduction.op == "sum" and reduction.value.type.element == "i32":
            total = f"wrap<int32_t>({total})"
        return f"{total} / {_as_float(loop.extent)}" if reduction.op == "mean" else total

    def _acc(self, reduction: Reduction | Running | Selection) -> str:
        return self.own(f"{reduction.name}_acc")

    def _in_sweep(self, step: InSweep, writer: CppText) -> list[str]:
        match step:
            case Let(name=name, value=value):
                text = writer.text(value)
                if writer.is_lanes(value):
                    writer.lanes.add(name)
                return [f"const auto {self._name(name)} = {text};"]
            case Reduction(value=value):
                text = writer.text(value) if writer.is_float(value) else writer.lanes_text(value)
                return [f"{self._acc(step)}.add({text}, {writer.loop.variable if writer.loop else ''});"]
            case Running(name=name, value=value):
                writer.lanes.add(name)
                text = f"{self._acc(step)}.add({writer.lanes_text(value)}, {sweep_variable(writer)})"
                return [f"const auto {self._name(name)} = {text};"]
            case Selection(value=value):
                return [f"{self._acc(step)}.add({writer.lanes_text(value)}, {sweep_variable(writer)});"]
            case Store(location=location, value=value):
                at, by = writer.address(location)
                where = f"{at}, {writer.loop.variable if writer.loop else ''}"
                return [f"store({where}, {writer.stored(location, value)});" if by == "1" else
                        f"store_strided({by}, {where}, {writer.stored(location, value)});"]  # fmt: skip
            case Fold():
                return self._fold(step, writer)
        raise AssertionError(f"a sweep holds no {type(step).__name__}")

    def _fold(self, fold: Fold, writer: CppText) -> list[str]:
        writer.lanes.add(fold.name)
        start, combine, lanes = _fold_text(fold)
        name, at, extent = self._name(fold.name), fold.loop.variable, size_text(fold.loop.extent)
        value = writer.lanes_text(fold.value)
        lines = [
            f"{lanes} {name} = {start};",
            f"for (int64_t {at} = 0; {at} < {extent}; ++{at}) {{",
            *indented([combine.format(name, value) + ";"]),
            "}",
        ]
        return [*lines, f"{name} /= {_as_float(fold.loop.extent)};"] if fold.op == "mean" else lines


def sweep_variable(writer: CppText) -> str:
    assert writer.loop is not None, "the step is part of a sweep"
    return writer.loop.variable


def _accumulator(reduction: Reduction | Running) -> str:
    """`Sum` or `CumMax`, or `IntMax` and `LongCumSum` for integers."""
    element = reduction.value.type.element
    prefix = "" if element not in INTEGERS else "Long" if element == "i64" else "Int"
    return f"{prefix}{_ACCUMULATORS[reduction.op]}"


def _selection_type(selection: Selection) -> str:
    """`TopK<float, 0>`"""
    number = {"i8": "int32_t", "i32": "int32_t", "i64": "int64_t"}.get(selection.value.type.element, "float")
    return f"TopK<{number}, {selection.number}>"


def _fold_text(fold: Fold) -> tuple[str, str, str]:
    """The value before the first element, the statement that adds one, and the type of the lanes."""
    element = fold.value.type.element
    if element not in INTEGERS:
        return (*_FOLDS[fold.op], "Floats")
    start, combine = _INTEGER_FOLDS[fold.op]
    lanes, bits = ("Longs", 64) if element == "i64" else ("Ints", 32)
    return start.format(bits, lanes.lower()), combine, lanes


def _positions(rows: Sequence[Loop], row: str) -> list[str]:
    """`i_T = row / N`, `i_N = row % N`."""
    found = []
    for number, loop in enumerate(rows):
        inner = size_text(volume(other.extent for other in rows[number + 1 :]))
        text = row if number == len(rows) - 1 else f"{row} / {inner if inner.isidentifier() else f'({inner})'}"
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
