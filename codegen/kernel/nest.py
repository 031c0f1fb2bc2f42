"""Schedules the statements of one nest: sweeps, values of the row, reductions and selections, and stores."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, groupby

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import (
    Binary,
    Cast,
    Dot,
    Expr,
    Gather,
    IfPresent,
    Reduce,
    ReduceOp,
    Ref,
    Scan,
    Select,
    Statement,
    TopK,
    Unary,
    View,
    children,
)
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.kernel.definitions import Definitions
from sageLLM.codegen.kernel.indexing import LoweringError, Positions, base_index, position
from sageLLM.codegen.kernel.inline import unused_name
from sageLLM.codegen.kernel.loops import LoopVariables
from sageLLM.codegen.kernel.rows import (
    Affine,
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
    loop_name,
)
from sageLLM.codegen.kernel.scatter import Scatter

MAX_SELECTIONS = 4
"""Selections of a row, each of which has scratch memory (`topk.h`)."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The dims of a stored statement: those of its rows, and the swept one (None: one value per row)."""

    rows: tuple[Size, ...]
    inner: Size | None
    merged: Mapping[Size, tuple[Size, ...]]


@dataclass(slots=True)
class SweepBuilder:
    loop: Loop
    steps: list[InSweep] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)

    def sweep(self, order: Mapping[str, int]) -> Sweep:
        """Runs of lets in the order of the spec. Stores come last: an output may share the memory of an input."""
        runs = (list(run) for _, run in groupby(self.steps, key=type))
        lets = (sorted(run, key=lambda step: order.get(getattr(step, "name", ""), 0)) for run in runs)
        return Sweep(self.loop, (*chain.from_iterable(lets), *self.stores))

    @property
    def names(self) -> set[str]:
        return {step.name for step in self.steps if isinstance(step, Let | Fold | Running)}


class NestBuilder(LoopVariables):
    """Schedules the statements of one nest. Steps are only ever appended, so a step may use everything before it."""

    def __init__(self, lowering: Definitions, rows: tuple[Size, ...]) -> None:
        super().__init__(rows)
        self.lowering = lowering
        self._steps: list[Step | SweepBuilder] = []
        self._known: dict[str, int] = {}  # values of the row, each with the step that computes it
        self._reductions: dict[Expr, str] = {}
        self._folds: dict[tuple[Expr, tuple[Affine | None, ...]], str] = {}
        self._selections: dict[tuple[Expr, Size, Size], str] = {}
        self._stored: dict[str, tuple[int, Location]] = {}

    def nest(self) -> Nest:
        order = {name: number for number, name in enumerate(self.lowering.values)}
        steps = (step.sweep(order) if isinstance(step, SweepBuilder) else step for step in self._steps)
        return Nest(self._loops, tuple(steps))

    def store(self, statement: Statement, domain: Domain) -> None:
        """Adds the store of an output or of a part of one, after the steps that it depends on."""
        self.merged = domain.merged
        swept = (domain.inner,) if domain.inner is not None else ()
        here = self.positions(swept)
        location = self._location(statement, here)  # first, as it may add indices of the row
        found = [self._known[name] for at in location.index for name in at.variables if name in self._known]
        if domain.inner is None and statement.target in self.lowering.read:  # named, as others read it
            statement = replace(statement, value=Ref(statement.value.type, statement.target))
        after = max([self._prepare(statement.value, here), *found])
        if domain.inner is None:
            value = Writer(self, None, here).lower(statement.value)
            self._steps.append(Store(location, value))
            return
        at, sweep = self._sweep(Loop(self.variable(domain.inner), domain.inner), after)
        value = Writer(self, sweep, here).lower(statement.value)
        is_named = isinstance(value, Ref) and value.name == statement.target
        if not is_named and (statement.target in self.lowering.read or statement.target in self.lowering.views):
            sweep.steps.append(Let(statement.target, value))
            value = Ref(statement.value.type, statement.target)
        sweep.stores.append(Store(location, value))
        self._stored[statement.target] = (at, location)

    # scheduling

    def _prepare(self, expr: Expr, here: Positions) -> int:
        """Schedules all values of the row that `expr` needs; returns the last step that computes one."""
        match expr:
            case Ref(name=name) if name in self.lowering.values:
                return self._prepare_name(name, expr, here)
            case Ref(name=name) if name in self.lowering.views:
                view = self.lowering.views[name]
                inside = dict(zip(view.base_type.dims, base_index(view, here), strict=True))
                return self._prepare(Ref(view.base_type, view.base), inside)
            case Reduce() | Dot() if self.is_of_row(expr.type, here):
                return self._reduce(self.reduction_name(expr), as_reduce(expr), here)
            case TopK():
                return self._known[self.selection_name(expr, here)]
            case Gather(table=table, dim=dim, index=index):
                variable = self.index_variable(dim, index, here)
                return max(self._known[variable], self._prepare(table, {**here, dim: Affine.of(variable)}))
        return max((self._prepare(child, self.below_positions(expr, here)) for child in children(expr)), default=-1)

    def _prepare_name(self, name: str, ref: Ref, here: Positions) -> int:
        if name in self._stored and self.is_local(ref.type, here):
            return self._stored[name][0] - 1  # in the same sweep, or reloaded in a later one
        value = self.lowering.values[name]
        if not self.is_of_row(ref.type, here):
            return self._prepare(value, here)
        if name not in self._known:
            is_reduction = isinstance(value, Reduce | Dot)
            if is_reduction and self._reductions.setdefault(value, name) == name:
                return self._prepare(value, here)
            self._prepare(value, here)
            self._steps.append(Let(name, Writer(self, None, here).lower(value)))
            self._known[name] = len(self._steps) - 1
        return self._known[name]

    def _reduce(self, name: str, expr: Reduce, here: Positions) -> int:
        if name not in self._known:
            loop = self.reduced(expr, here)
            inside = {**here, expr.dim: Affine.of(loop.variable)}
            at, sweep = self._sweep(loop, self._prepare(expr.x, inside))
            value = Writer(self, sweep, inside).lower(expr.x)
            sweep.steps.append(Reduction(name, expr.op, value))
            self._known[name] = at
        return self._known[name]

    def selection_name(self, expr: TopK, here: Positions) -> str:
        """The name of a selection, scheduled on first use. Its values and its indices share it."""
        key = expr.x, expr.dim, expr.k
        if key not in self._selections:
            if not self.is_of_row(ValueType("", tuple(dim for dim in expr.x.type.dims if dim != expr.dim)), here):
                raise LoweringError(f"it selects along {expr.dim} of a value that changes along the row")
            if len(self._selections) == MAX_SELECTIONS:
                raise LoweringError(f"it selects more than {MAX_SELECTIONS} times in a row")
            loop = self.reduced(expr, here)
            taken = {*self._selections.values(), *self.lowering.values}
            name = unused_name(f"top_{expr.k if expr.k.name or expr.k.constant else 'k'}", taken)
            inside = {**here, expr.dim: Affine.of(loop.variable)}
            at, sweep = self._sweep(loop, self._prepare(expr.x, inside))
            value = Writer(self, sweep, inside).lower(expr.x)
            top = Loop(self.variable(expr.k), expr.k)
            sweep.steps.append(Selection(name, top, value, len(self._selections)))
            self._selections[key] = name
            self._known[name] = at
        return self._selections[key]

    def scan_name(self, expr: Scan) -> str:
        """The name of the statement that is the scan and nothing else; otherwise `cumsum_over_H`."""
        names = (name for name, value in self.lowering.values.items() if value == expr)
        return next(names, None) or f"{expr.op}_over_{loop_name(expr.dim).removeprefix('i_')}"

    def _sweep(self, loop: Loop, after: int) -> tuple[int, SweepBuilder]:
        """The first sweep of the loop after step `after`, or a new one."""
        for at, step in enumerate(self._steps):
            if at > after and isinstance(step, SweepBuilder) and step.loop == loop:
                return at, step
        sweep = SweepBuilder(loop)
        self._steps.append(sweep)
        return len(self._steps) - 1, sweep

    # names

    def reduction_name(self, expr: Reduce | Dot) -> str:
        """The name of the statement that is the reduction and nothing else; otherwise a new one, like `mean_over_H`."""
        if expr not in self._reductions:
            op = expr.op if isinstance(expr, Reduce) else "dot"
            name = f"{op}_over_{loop_name(expr.dim).removeprefix('i_')}"
            self._reductions[expr] = unused_name(name, self._reductions.values())
        return self._reductions[expr]

    def fold_name(self, expr: Reduce | Dot, here: Positions) -> str:
        """As `reduction_name`, with another name for each position that is not that of the loops."""
        if self.is_local(expr.type, here):
            return self.reduction_name(expr)
        key = expr, tuple(here.get(dim) for dim in expr.type.dims)
        if key not in self._folds:
            taken = (self.reduction_name(expr), *self._reductions.values(), *self._folds.values())
            self._folds[key] = unused_name(taken[0], taken)
        return self._folds[key]

    def index_variable(self, dim: Size, index: Expr, here: Positions) -> str:
        """The variable of an index from data along the dim; scheduled on first use."""
        if index not in self._indices:
            if not self.is_of_row(index.type, here):
                raise LoweringError("it gathers by an index that changes along the row")
            self._prepare(index, here)
            name = unused_name(loop_name(dim), (*self._indices.values(), *self._variables.values()))
            self._steps.append(Index(name, Writer(self, None, here).lower(index)))
            self._indices[index] = name
            self._known[name] = len(self._steps) - 1
        return self._indices[index]

    def _location(self, statement: Statement, here: Positions) -> Location:
        lowering, view = self.lowering, self.lowering.views.get(statement.target)
        if view is not None:
            output = lowering.program.root(view.name)
            found = lowering.index_in(view, output, here)
            return Location(output, tuple(found[dim] for dim in lowering.outputs[output].dims))
        part = lowering.views.get(statement.value.name) if isinstance(statement.value, Ref) else None
        if part is not None and (whole := lowering.program.root(part.name)) not in lowering.inputs:
            here = {**here, **lowering.index_in(part, whole, here)}  # one part of a combined value
        if isinstance(statement, Scatter):
            found = {dim: Affine.of(self.index_variable(dim, at, here)) for dim, at in statement.index}
            here = {**here, **found}
        dims = self.lowering.outputs[statement.target].dims
        return Location(statement.target, tuple(position(dim, here) for dim in dims))

    def reload(self, name: str, sweep: SweepBuilder | None) -> Location | None:
        """The location of an output that an earlier sweep stored, otherwise None."""
        if name not in self._stored or not self.lowering.reloads:
            return None
        at, location = self._stored[name]
        return None if self._steps[at] is sweep else location


@dataclass(slots=True)
class Writer:
    """Lowers expressions at one point of a nest: within a sweep, or for the row."""

    nest: NestBuilder
    sweep: SweepBuilder | None
    here: Positions

    def lower(self, expr: Expr) -> Expr:
        match expr:
            case Ref():
                return self._ref(expr)
            case Reduce() | Dot():
                return self._reduce(expr)
            case Scan():
                return self._scan(expr)
            case TopK():
                return self._selected(expr)
            case Gather(table=table, dim=dim, index=index):
                variable = self.nest.index_variable(dim, index, self.here)
                return Writer(self.nest, self.sweep, {**self.here, dim: Affine.of(variable)}).lower(table)
            case Unary(x=x) | Cast(x=x):
                return replace(expr, x=self.lower(x))
            case Binary(a=a, b=b) | IfPresent(a=a, b=b):
                return replace(expr, a=self.lower(a), b=self.lower(b))
            case Select(condition=condition, a=a, b=b):
                return replace(expr, condition=self.lower(condition), a=self.lower(a), b=self.lower(b))
        return expr

    def _ref(self, ref: Ref) -> Expr:
        lowering = self.nest.lowering
        if ref.name in lowering.inputs:
            return self._load(ref.name, tuple(position(dim, self.here) for dim in ref.type.dims), ref.type)
        view = lowering.views.get(ref.name)
        if view is not None and ref.name not in lowering.values:
            return self._viewed(view, ref.type)
        if self.nest.is_of_row(ref.type, self.here):
            return ref
        if self.sweep is None or not self.nest.is_local(ref.type, self.here):
            return self.lower(lowering.values[ref.name])
        if ref.name not in self.sweep.names:
            location = self.nest.reload(ref.name, self.sweep)
            if location is None and isinstance(lowering.values[ref.name], Scan):
                return self.lower(lowering.values[ref.name])
            value = Load(ref.type, location) if location else self.lower(lowering.values[ref.name])
            self.sweep.steps.append(Let(ref.name, value))
        return ref

    def _load(self, operand: str, index: tuple[Affine, ...], type_: ValueType) -> Load:
        return Load(type_, Location(operand, index))

    def _viewed(self, view: View, type_: ValueType) -> Expr:
        index = base_index(view, self.here)
        if view.base in self.nest.lowering.inputs:
            return self._load(view.base, index, type_)
        inside = dict(zip(view.base_type.dims, index, strict=True))
        value = self.nest.lowering.values.get(view.base)
        if value is None and view.base in self.nest.lowering.views:
            return Writer(self.nest, self.sweep, inside)._viewed(self.nest.lowering.views[view.base], type_)
        if value is None:
            raise LoweringError(f"it views '{view.base}', which combines several parts")
        return Writer(self.nest, self.sweep, inside).lower(value)

    def _scan(self, expr: Scan) -> Expr:
        """Only a sweep along the dim has the elements in order."""
        variable = self.nest.variable(expr.dim)
        is_swept = self.sweep is not None and self.sweep.loop == Loop(variable, expr.dim)
        if self.sweep is None or not is_swept or not self.nest.is_local(expr.type, self.here):
            raise LoweringError(f"it scans along {expr.dim}, which is not the dim of the sweep")
        name = self.nest.scan_name(expr)
        if name not in self.sweep.names:
            value = self.lower(expr.x)
            self.sweep.steps.append(Running(name, expr.op, value))
        return Ref(expr.type, name)

    def _selected(self, expr: TopK) -> Expr:
        name, variable = self.nest.selection_name(expr, self.here), self.nest.variable(expr.k)
        is_swept = self.sweep is not None and self.sweep.loop == Loop(variable, expr.k)
        if not is_swept or self.here.get(expr.k) != Affine.of(variable):
            raise LoweringError(f"it reads the {expr.k} largest elements outside a sweep over them")
        return Selected(expr.type, name, expr.part, variable)

    def _reduce(self, expr: Reduce | Dot) -> Expr:
        if self.nest.is_of_row(expr.type, self.here):
            return Ref(expr.type, self.nest.reduction_name(expr))
        if self.sweep is None:
            raise LoweringError(f"it reduces {expr.dim} outside the loops")
        reduction = as_reduce(expr)
        loop = self.nest.folded(expr.dim, self.here)
        name = self.nest.fold_name(expr, self.here)
        if name in self.sweep.names:
            return Ref(expr.type, name)
        inside = {**self.here, expr.dim: Affine.of(loop.variable)}
        value = Writer(self.nest, None, inside).lower(reduction.x)
        self.sweep.steps.append(Fold(name, reduction.op, loop, value))
        return Ref(expr.type, name)


def as_reduce(expr: Reduce | Dot) -> Reduce:
    """A dot product as a sum of products."""
    if isinstance(expr, Reduce):
        return expr
    x, w = (_widened(operand, expr.type.element) for operand in (expr.x, expr.w))
    dims = (*x.type.dims, *(dim for dim in w.type.dims if dim not in x.type.dims))
    product = Binary(ValueType(expr.type.element, dims), "*", x, w)
    op: ReduceOp = "sum"
    return Reduce(expr.type, op, product, expr.dim)


def _widened(operand: Expr, element: str) -> Expr:
    return operand if operand.type.element == element else Cast(ValueType(element, operand.type.dims), operand)
