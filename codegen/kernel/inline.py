"""Inlining of fused ops: one program, with each call replaced by the equations of the op that it calls."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import count

from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.tree import (
    AttrRef,
    Binary,
    Cast,
    DimRef,
    Dot,
    Expr,
    Gather,
    IfPresent,
    Number,
    Program,
    Reduce,
    Ref,
    Scan,
    Select,
    Slice,
    Statement,
    TopK,
    Unary,
    View,
)
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.kernel.rows import RowProgram
from sageLLM.codegen.kernel.scatter import Scatter, kv_store_program
from sageLLM.codegen.model.binding import Binding
from sageLLM.codegen.model.op import AttrFormula, AttrName, Call, OpDef


class Programs:
    """The equations of ops, with those of the ops that they fuse inlined. Each op is inlined once for all emitters."""

    def __init__(self, ops: Mapping[str, OpDef]) -> None:
        self.ops = ops
        self._known: dict[str, Program | None] = {}
        self.row_programs: dict[str, RowProgram] = {}
        """The loops of ops, once `kernel.lower` has made them for the first target that asks."""

    def of(self, op: OpDef) -> Program | None:
        """The program of an op, or of a variant of one; None if it has a reference, or fuses an op that has one.

        One reference has equations too: the store of keys and values, which fused ops end with.
        """
        if op.program is not None or not op.fuses:
            return op.program or kv_store_program(op)
        if self.is_variant(op):
            return self._inlined(op)
        if op.name not in self._known:
            self._known[op.name] = self._inlined(op)
        return self._known[op.name]

    def is_variant(self, op: OpDef) -> bool:
        """Whether an op differs from the one of its name, as a GEMM without its consumer does."""
        return self.ops.get(op.name) is not op

    def _inlined(self, op: OpDef) -> Program | None:
        types = {o.name: o.type for o in op.inputs}
        views: list[View] = []
        statements: list[Statement] = []
        taken = {one.name for one in (*op.inputs, *op.outputs)} | {attr.name for attr in op.attrs}
        taken |= {target for call in op.fuses for target in call.targets}
        for call in op.fuses:
            callee = self.ops[call.op]
            body = self.of(callee)
            if body is None:
                return None
            inlined = _Inliner(op, call, callee, body, types, taken).program()
            views += inlined.views
            statements += inlined.statements
        return Program(tuple(views), tuple(statements))


class _Inliner:
    """Rewrites the equations of one callee in terms of the caller's names, dims and element types."""

    def __init__(
        self, op: OpDef, call: Call, callee: OpDef, body: Program, types: dict[str, ValueType], taken: set[str]
    ) -> None:
        self._body, self._binding = body, Binding()
        self._optional = {o.name for o in op.inputs if o.optional} | {a.name for a in op.attrs if a.optional}
        padded = (*call.args, *[None] * (len(callee.inputs) - len(call.args)))
        self._arguments = dict(zip((o.name for o in callee.inputs), padded, strict=True))
        self._binding.fix(callee, call.kwargs)
        for operand in callee.inputs:
            argument = self._arguments[operand.name]
            if argument is not None:
                self._binding.match(operand.type, types[argument])
        self._attrs = self._attr_values(callee, dict(call.kwargs))
        targets = dict(zip((o.name for o in callee.outputs), call.targets, strict=True))
        self._names = {name: arg for name, arg in self._arguments.items() if arg is not None} | targets
        for view in body.views:
            self._names[view.name] = _fresh(view.name, taken)
        for statement in body.statements:
            if statement.target not in self._names:
                self._names[statement.target] = _fresh(statement.target, taken)
        for output, target in zip(callee.outputs, call.targets, strict=True):
            types[target] = self._binding.apply(output.type)

    def _attr_values(self, callee: OpDef, given: Mapping[str, object]) -> dict[str, Expr | None]:
        values: dict[str, Expr | None] = {}
        for attr in callee.attrs:
            value = given.get(attr.name, attr.default)
            if isinstance(value, AttrName):
                values[attr.name] = AttrRef(ValueType(_literal(attr.type)), value.name)
            elif isinstance(value, AttrFormula):
                values[attr.name] = value.value or DimRef(ValueType("int"), value.size or Size.of(0))
            elif isinstance(value, bool | int | float | str):
                values[attr.name] = Number(ValueType(_literal(attr.type)), value)
            else:
                values[attr.name] = None
        return values

    def program(self) -> Program:
        views = tuple(self._view(view) for view in self._body.views)
        return Program(views, tuple(self._statement(statement) for statement in self._body.statements))

    def _statement(self, statement: Statement) -> Statement:
        target, value = self._names[statement.target], self._expr(statement.value)
        if not isinstance(statement, Scatter):
            return Statement(target, value)
        return Scatter(target, value, tuple((self._size(dim), self._expr(at)) for dim, at in statement.index))

    def _view(self, view: View) -> View:
        slices: list[Slice | None] = []
        for cut, dim in zip(view.slices, view.base_type.dims, strict=True):
            ends = (self._size(size) for size in (cut.start, cut.stop, cut.step, cut.length)) if cut else None
            bound = Slice(*ends) if ends else None
            slices += [None] * len(self._binding.leading or ()) if dim == LEADING else [bound]
        shape = self._binding.apply(ValueType("", view.shape)).dims if view.shape is not None else None
        base, type_ = self._binding.apply(view.base_type), self._binding.apply(view.type)
        return View(self._names[view.name], self._names[view.base], base, tuple(slices), shape, type_)

    def _size(self, size: Size) -> Size:
        return size.substitute(self._binding.dims)

    def _expr(self, expr: Expr) -> Expr:
        type_ = self._binding.apply(expr.type)
        match expr:
            case Ref(name=name):
                return Ref(type_, self._names[name])
            case AttrRef(name=name):
                value = self._attrs[name]
                assert value is not None, f"the attr {name} must be present: the linker checks that"
                return value
            case DimRef(size=size):
                return DimRef(type_, self._size(size))
            case Unary(x=x):
                return replace(expr, type=type_, x=self._expr(x))
            case Binary(a=a, b=b):
                return replace(expr, type=type_, a=self._expr(a), b=self._expr(b))
            case Select(condition=condition, a=a, b=b):
                return Select(type_, self._expr(condition), self._expr(a), self._expr(b))
            case Cast(x=x):
                return Cast(type_, self._expr(x))
            case Reduce(x=x, dim=dim):
                return replace(expr, type=type_, x=self._expr(x), dim=self._size(dim))
            case Scan(x=x, dim=dim):
                return replace(expr, type=type_, x=self._expr(x), dim=self._size(dim))
            case TopK(x=x, dim=dim, k=k):
                return replace(expr, type=type_, x=self._expr(x), dim=self._size(dim), k=self._size(k))
            case Dot(x=x, w=w, dim=dim):
                return Dot(type_, self._expr(x), self._expr(w), self._size(dim))
            case Gather(table=table, dim=dim, index=index):
                return Gather(type_, self._expr(table), self._size(dim), self._expr(index))
            case IfPresent():
                return self._if_present(expr, type_)
        return replace(expr, type=type_)

    def _if_present(self, expr: IfPresent, type_: ValueType) -> Expr:
        """Decided here, unless the argument of the call is itself optional."""
        passed = self._passed(expr.name)
        if passed is None:
            return self._expr(expr.b)
        if passed not in self._optional:
            return self._expr(expr.a)
        return IfPresent(type_, passed, self._expr(expr.a), self._expr(expr.b))

    def _passed(self, name: str) -> str | None:
        if name in self._arguments:
            return self._arguments[name]
        value = self._attrs[name]
        return value.name if isinstance(value, AttrRef) else None if value is None else ""


def _fresh(name: str, taken: set[str]) -> str:
    """The callee's name if it is unused, else with a number; it is taken from now on."""
    taken.add(fresh := unused_name(name, taken))
    return fresh


def unused_name(name: str, taken: Collection[str]) -> str:
    """The name, or `name_2`, `name_3` ... if it is taken."""
    return next(one for number in count(1) if (one := name if number == 1 else f"{name}_{number}") not in taken)


def _literal(attr_type: str) -> str:
    return {"f32": "float", "i32": "int", "bool": "truth", "str": "str", "dim": "int"}[attr_type]
