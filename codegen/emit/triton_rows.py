"""Writes row programs as Triton: a program has ROWS rows, and of each row the BLOCK columns of a sweep.

    row = ...[:, None]                                the rows
    i_H = tl.arange(0, BLOCK_H)[None, :]              the columns of a sweep over H
    xf = tl.load(x + row * x_R + i_H, mask=...)       values are tiles [ROWS, BLOCK_H]
    ms = tl.sum(..., 1)[:, None] / H                  values of the row are tiles [ROWS, 1]

Without reductions a program has one block of columns. With them it has whole rows: as one tile, which is loaded once,
or, if rows are too long for that, block after block in as many sweeps as the row program has.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sageLLM.codegen.emit.dim_text import tidy
from sageLLM.codegen.emit.triton_cache_rows import Piece, store_lines
from sageLLM.codegen.emit.triton_names import affine, block_name, bracketed, inside_name, size_text
from sageLLM.codegen.emit.triton_reductions import (
    EMPTY_I32,
    EMPTY_I64,
    INTEGER_FORM,
    INTEGER_JOIN,
    INTEGER_SCAN,
    JOIN,
    OF_SCAN,
    ROW_FORM,
    SCAN,
    accumulated,
    empty_text,
    join_text,
)
from sageLLM.codegen.emit.triton_text import TritonText
from sageLLM.codegen.expr.tree import Expr, Ref, walk
from sageLLM.codegen.expr.types import INTEGERS
from sageLLM.codegen.kernel.names import OwnNames, stride_name
from sageLLM.codegen.kernel.rows import (
    Fold,
    Index,
    InSweep,
    Let,
    Load,
    Location,
    Loop,
    Nest,
    Reduction,
    Running,
    Selected,
    Selection,
    Step,
    Store,
    Sweep,
)
from sageLLM.codegen.kernel.scatter import is_cache
from sageLLM.codegen.model.op import OpDef


class RowKernel:
    """The lines of the kernel for one nest; if it has reductions, `whole` makes a row one tile and not many blocks."""

    rows_block = "ROWS"  # the number of rows that a program has at once
    reserved: tuple[str, ...] = ()  # variables of the template, which values of the spec must not be named like

    def __init__(self, op: OpDef, nest: Nest, own: OwnNames, *, whole: bool, program: str = "tl.program_id(0)") -> None:
        self.op, self.nest, self.own, self.whole, self.program = op, nest, own, whole, program
        self.lines: list[str] = []
        self._operands = {operand.name: operand for operand in (*self.op.inputs, *self.op.outputs)}
        self._values = {name: own(f"{name}_value") for name in (*(o.name for o in op.outputs), *self.reserved)}
        self._text = TritonText(self._leaf)
        self._done: set[tuple[str, str]] = set()  # loop and name of the values that are in registers already
        self._row_names = {loop.variable for loop in self.nest.rows}
        self._early: dict[Load, str] = {}
        self._encoded: dict[str, list[Piece]] = {}  # by cache, what is stored when the row is complete
        self._write()

    @property
    def has_reductions(self) -> bool:
        """Whether an element of the result depends on the whole row."""
        return any(isinstance(step, Reduction | Running | Selection) for step in self._sweep_steps)

    @property
    def encodes(self) -> bool:
        """Whether it stores rows of a KV cache, which may be codes: their scale depends on the whole row."""
        steps = [*self._sweep_steps, *(step for step in self.nest.steps if not isinstance(step, Sweep))]
        stored = [step.location.operand for step in steps if isinstance(step, Store)]
        read = [one.location.operand for step in steps for one in walk(step.value) if isinstance(one, Load)]
        caches = {name for name, operand in self._operands.items() if is_cache(operand)}
        return bool(caches & {*stored}) and not caches & {*read}

    @property
    def needs_rows(self) -> bool:
        """Whether a program needs whole rows."""
        return self.has_reductions or self.encodes

    @property
    def selections(self) -> list[Selection]:
        return [step for step in self._sweep_steps if isinstance(step, Selection)]

    @property
    def _sweep_steps(self) -> list[InSweep]:
        return [step for sweep in self.nest.sweeps for step in sweep.steps]

    @property
    def loops(self) -> list[Loop]:
        """The loops of the sweeps, each once."""
        return list(dict.fromkeys(sweep.loop for sweep in self.nest.sweeps))

    @property
    def rows_text(self) -> str:
        """The number of rows: `T * N`."""
        return " * ".join(bracketed(size_text(loop.extent)) for loop in self.nest.rows) or "1"

    # statements

    def _write(self) -> None:
        for element, operand in self.op.element_inputs.items():
            self.lines.append(f"{element}: tl.constexpr = {operand}.dtype.element_ty")
        self.lines += self._rows()
        for step in self.nest.steps:
            self._step(step)
        for pieces in self._encoded.values():
            self._put(*self._row_of_cache(pieces))
        text = "\n".join(self.lines)
        self.lines = [line for line in self.lines if not _is_unused(line, text)]

    def _rows(self) -> list[str]:
        is_single = len(self.nest.rows) == 1
        row = self.nest.rows[0].variable if is_single else self.own("row")
        program = f"{self.program}.to(tl.int64)" if is_single else self.program  # division of 32 bits is faster
        lines = [f"{row} = ({program} * ROWS + tl.arange(0, ROWS))[:, None]"]
        lines += [f"{self.own('is_row')} = {row} < {self.rows_text}"]
        if is_single:
            return lines
        rest = row
        for number, loop in reversed(list(enumerate(self.nest.rows))):
            extent = bracketed(size_text(loop.extent))
            lines.append(f"{loop.variable} = {f'({rest}).to(tl.int64)' if number == 0 else f'{rest} % {extent}'}")
            rest = f"{rest} // {extent}"
        return lines

    def _step(self, step: Step) -> None:
        match step:
            case Index(variable=variable, value=value):
                self._row_names.add(variable)
                index = replace(self._text, is_index=True)(value)
                self._put(f"{variable} = {tidy(f'({index}).to(tl.int64)')}")
            case Let(name=name, value=value):
                self._put(f"{self._name(name)} = {tidy(self._text(value))}")
            case Store():
                self._store(step)
            case Sweep():
                self._sweep(step)

    def _sweep(self, sweep: Sweep) -> None:
        loop = sweep.loop
        if not self.needs_rows:
            self._put(*_block(loop, f"tl.program_id(1) * {block_name(loop)}"))
        elif self.whole:
            self._columns(loop)
        else:
            self._looped(sweep)
            return
        for step in sweep.steps:
            self._in_sweep(step, loop)

    def _looped(self, sweep: Sweep) -> None:
        """The sweep block after block; its reductions are tiles until all blocks are done."""
        loop = sweep.loop
        reductions = [step for step in sweep.steps if isinstance(step, Reduction)]
        stored = {location.operand for location in _stored_before(self.nest, sweep)}
        if any(isinstance(one, Load) and one.location.operand in stored for one in _values(sweep)):
            self._put("tl.debug_barrier()  # the next loads read what other threads of the program stored")
        for running in (step for step in sweep.steps if isinstance(step, Running)):
            dtype = accumulated(running.value)
            self._put(f"{self._carry(running)} = tl.full([{self.rows_block}, 1], {empty_text(running)}, {dtype})")
        for one in reductions:
            empty, dtype = empty_text(one), accumulated(one.value)
            self._put(f"{self._acc(one)} = tl.full([{self.rows_block}, {block_name(loop)}], {empty}, {dtype})")
        start = self.own("start")
        body = self._body(sweep, start)
        header = f"for {start} in range(0, {size_text(loop.extent)}, {block_name(loop)}):"
        self._put(header, *(f"    {line}" for line in body))
        for one in reductions:
            self._put(f"{self._name(one.name)} = {self._total(one, self._acc(one), loop)}")

    def _body(self, sweep: Sweep, start: str) -> list[str]:
        """The lines for one block of columns, of which `start` is the first."""
        outer, self.lines, self._done = self.lines, [], set()
        self._put(*_block(sweep.loop, start))
        for step in sweep.steps:
            self._in_sweep(step, sweep.loop)
        body, self.lines = self.lines, outer
        return body

    def _in_sweep(self, step: InSweep, loop: Loop) -> None:
        match step:
            case Let(name=name, value=value):
                if (loop.variable, name) not in self._done:
                    self._put(f"{self._name(name)} = {tidy(self._text(value))}")
                    self._done.add((loop.variable, name))
            case Fold():
                self._fold(step, loop)
            case Reduction(value=value):
                masked = f"tl.where({inside_name(loop)}, {self._text(value)}, {empty_text(step)})"
                if self.whole:
                    self._put(f"{self._name(step.name)} = {self._total(step, tidy(masked), loop)}")
                else:
                    self._put(join_text(step).format(self._acc(step), tidy(masked)))
            case Running():
                self._running(step, loop)
            case Selection():
                self._selection(step, loop)
            case Store():
                self._store(step)

    def _running(self, step: Running, loop: Loop) -> None:
        """A scan of the tile; the results of a block continue from the last column of the block before."""
        if (loop.variable, step.name) in self._done:
            return
        self._done.add((loop.variable, step.name))
        name = self._name(step.name)
        masked = tidy(f"tl.where({inside_name(loop)}, {self._text(step.value)}, {empty_text(step)})")
        is_integer = step.value.type.element in INTEGERS
        scanned = (INTEGER_SCAN if is_integer else SCAN)[step.op].format(masked)
        self._put(f"{name} = {scanned}")
        if not self.whole:
            join = (INTEGER_JOIN if is_integer else JOIN)[OF_SCAN[step.op]]
            self._put(join.format(name, self._carry(step)), f"{self._carry(step)} = device.last_column({name})")

    def _carry(self, step: Running) -> str:
        return self.own(f"{step.name}_last")

    def _selection(self, step: Selection, loop: Loop) -> None:
        """The largest element, `k` times, each after the one before; by keys, which order NaN and ties too."""
        assert self.whole, "a selection is never looped"
        dtype, element = accumulated(step.value), step.value.type.element
        key_dtype = dtype if element in INTEGERS else "tl.int32"
        least, most = (EMPTY_I64 if key_dtype == "tl.int64" else EMPTY_I32)["amax"], "9223372036854775807"
        most = most if key_dtype == "tl.int64" else "2147483647"
        name, key, last = step.name, self.own(f"{step.name}_key"), self.own(f"{step.name}_last")
        text, number = tidy(self._text(step.value)), self.own("number")
        self._columns(step.k)
        shape = f"[ROWS, {block_name(step.k)}]"
        self._put(
            f"{key} = {f'({text}).to({key_dtype})' if element in INTEGERS else f'device.key_of({text})'}",
            f"{last} = tl.full([ROWS, 1], {most}, {key_dtype})",
            f"{last}_index = tl.full([ROWS, 1], -1, tl.int32)",
            f"{name} = tl.zeros({shape}, {key_dtype})",
            f"{step.index_name} = tl.zeros({shape}, tl.int32)",
            f"for {number} in range({size_text(step.k.extent)}):",
            f"    {last}, {last}_index = device.next_largest("
            f"{key}, {loop.variable}, {inside_name(loop)}, {last}, {last}_index, {least})",
            f"    {name} = tl.where({step.k.variable} == {number}, {last}, {name})",
            f"    {step.index_name} = tl.where({step.k.variable} == {number}, {last}_index, {step.index_name})",
        )
        if element not in INTEGERS:
            self._put(f"{name} = device.float_of({name})")

    def _columns(self, loop: Loop) -> None:
        """The columns of a loop, once."""
        if (loop.variable, loop.variable) not in self._done:
            self._put(f"{loop.variable} = tl.arange(0, {block_name(loop)})[None, :]")
            self._put(f"{inside_name(loop)} = {loop.variable} < {size_text(loop.extent)}")
            self._load_early(loop)
        self._done.add((loop.variable, loop.variable))

    def _load_early(self, loop: Loop) -> None:
        """Loads what all rows share, such as the weight of a norm, before the program waits for a reduction."""
        sweeps = [sweep for sweep in self.nest.sweeps if sweep.loop == loop]
        inputs = {operand.name: operand for operand in self.op.inputs}
        for load in dict.fromkeys(one for sweep in sweeps for one in _values(sweep) if isinstance(one, Load)):
            used = {name for at in load.location.index for name in at.variables}
            operand = inputs.get(load.location.operand)
            if operand is None or used != {loop.variable} or operand.name in self.op.inplace.values():
                continue
            number = sum(other.location.operand == operand.name for other in self._early)
            name = self.own(f"{operand.name}_shared{number or ''}")
            none = f" if {operand.name} is not None else None" if operand.optional else ""
            self._put(f"{name} = {self._leaf(load)}{none}")
            self._early[load] = name

    def _fold(self, fold: Fold, loop: Loop) -> None:
        extent, shape = size_text(fold.loop.extent), f"[{self.rows_block}, {block_name(loop)}]"
        name = self._name(fold.name)
        joined = join_text(fold).format(name, tidy(self._text(fold.value)))
        self._put(f"{name} = tl.full({shape}, {empty_text(fold)}, {accumulated(fold.value)})")
        self._put(f"for {fold.loop.variable} in range({extent}):", f"    {joined}")
        if fold.op == "mean":
            self._put(f"{name} = {name} / {bracketed(extent)}")

    def _name(self, name: str) -> str:
        """The name of a value; that of an output is the pointer's."""
        return self._values.get(name, name)

    def _acc(self, reduction: Reduction) -> str:
        """The tile that collects a reduction over the blocks of a row."""
        return self.own(f"{reduction.name}_acc")

    def _total(self, reduction: Reduction, text: str, loop: Loop) -> str:
        form = INTEGER_FORM if reduction.value.type.element in INTEGERS else ROW_FORM
        total = f"{form[reduction.op]}({text}, 1)[:, None]"
        return f"{total} / {bracketed(size_text(loop.extent))}" if reduction.op == "mean" else total

    def _store(self, store: Store) -> None:
        if self.encodes and is_cache(self._operands[store.location.operand]):
            self._keep(store)
            return
        address, mask = self._address(store.location), self._store_mask(store.location)
        if not mask:  # a single element, of the only row
            address, mask = f"{address} + {self.own('row')}", self.own("is_row")
        self._put(f"tl.store({address}, {tidy(self._text(store.value))}, mask={mask})")

    def _keep(self, store: Store) -> None:
        """Holds a piece of a row of a cache until the row is complete."""
        location = store.location
        pieces = self._encoded.setdefault(location.operand, [])
        value = tidy(self._text(store.value))
        if not value.isidentifier():
            name = self.own(f"{location.operand}_{len(pieces)}")
            self._put(f"{name} = {value}")
            value = name
        pieces.append(Piece(location, value, self._store_mask(location)))

    def _row_of_cache(self, pieces: Sequence[Piece]) -> Sequence[str]:
        location = pieces[0].location
        operand = self._operands[location.operand]
        rows = " + ".join(self._row_terms(location))
        return store_lines(operand, rows, [(self._address(one.location), one) for one in pieces], self.own)

    def _store_mask(self, location: Location) -> str:
        return self._mask(location)

    def _put(self, *lines: str) -> None:
        self.lines += lines

    # expressions

    def _leaf(self, expr: Expr) -> str:
        if isinstance(expr, Selected):
            return expr.selection if expr.part == "values" else f"{expr.selection}_index"
        if isinstance(expr, Ref):
            return self._values.get(expr.name, expr.name)
        assert isinstance(expr, Load), f"no Triton text for {type(expr).__name__}"
        if expr in self._early:
            return self._early[expr]
        mask = self._mask(expr.location)
        guarded = f", mask={mask}, other=0" if mask else ""
        text = f"tl.load({self._address(expr.location)}{guarded})"
        element = expr.type.element
        return text if element in (*INTEGERS, "bool", "f32") else f"{text}.to(tl.float32)"

    def _address(self, location: Location) -> str:
        last = affine(location.index[-1]) if location.index else "0"
        return " + ".join([*self._row_terms(location), *([last] if last != "0" else [])])

    def _row_terms(self, location: Location) -> list[str]:
        """The address of the first element of a row."""
        operand = self._operands[location.operand]
        terms = [operand.name]
        for number, at in enumerate(location.index[:-1]):
            if (text := affine(at)) != "0":
                terms.append(f"{bracketed(text)} * {stride_name(operand, number)}")
        return terms

    def _mask(self, location: Location) -> str:
        used = {name for at in location.index for name in at.variables}
        parts = [self.own("is_row")] if used & self._row_names else []
        parts += [inside_name(loop) for loop in self.loops if loop.variable in used]
        return " & ".join(parts)


def _block(loop: Loop, start: str) -> tuple[str, str]:
    """The columns of one block, and which of them exist."""
    columns = f"{loop.variable} = {start} + tl.arange(0, {block_name(loop)})[None, :]"
    return columns, f"{inside_name(loop)} = {loop.variable} < {size_text(loop.extent)}"


def _is_unused(line: str, text: str) -> bool:
    name = line.partition(" = ")[0].partition(":")[0]
    is_own = re.fullmatch(r"(i_)?[A-Z]\w*", name) is not None
    return is_own and len(re.findall(rf"\b{name}\b", text)) == 1


def _values(sweep: Sweep) -> Iterable[Expr]:
    for step in sweep.steps:
        yield from walk(step.value)


def _stored_before(nest: Nest, sweep: Sweep) -> Sequence[Location]:
    before = nest.sweeps[: nest.sweeps.index(sweep)]
    return [step.location for one in before for step in one.steps if isinstance(step, Store)]
