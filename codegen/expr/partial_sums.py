"""Propagates partial sums through a program, to find where it may run before an all-reduce.

A program may run on each rank's summand of a value if it is linear in that value: the ranks' results then sum to the
result. Partial sums arise from reductions over a dim that is divided over the ranks.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import (
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
    TopK,
    Unary,
    children,
    names_read,
)
from sageLLM.codegen.expr.types import INTEGERS


class SumState(Enum):
    """State of a value on one rank: complete (replicated or sharded), a summand of a sum over the ranks, or zero.

    Zero is neutral: it is a valid summand, and a complete value that equals zero on every rank.
    """

    COMPLETE = "complete"
    PARTIAL = "partial"
    ZERO = "zero"


class NotLinear(Exception):
    """The ranks' results would not sum to the result. `added` are complete operands added to a partial sum, if any."""

    def __init__(self, message: str, added: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.added = frozenset(added)


@dataclass(slots=True)
class PartialSumChecker:
    """Propagates states through the statements of one program.

    `states` holds the state of each operand, `is_divided` tells which dims are divided over the ranks, and `present`
    which optional operands and attrs are present (None where that is not known).
    """

    program: Program
    states: dict[str, SumState]
    is_divided: Callable[[Size], bool]
    present: Mapping[str, bool | None]

    def outputs(self, names: Iterable[str]) -> dict[str, SumState]:
        """The state of each output; raises NotLinear where it is neither complete nor a partial sum."""
        for view in self.program.views:
            if view.base in self.states:
                self.states[view.name] = self.states[view.base]
        for statement in self.program.statements:
            self.states[statement.target] = self.state(statement.value)
        return {name: self._output(name) for name in names}

    def _output(self, name: str) -> SumState:
        views = (view.name for view in self.program.views if self.program.root(view.name) == name)
        parts = [view for view in views if view in self.states]
        states = {self.states[part] for part in ([name] if name in self.states else parts)} - {SumState.ZERO}
        if len(states) > 1:
            complete = [part for part in parts if self.states[part] is SumState.COMPLETE]
            raise NotLinear(f"'{name}' would be complete in some views and partial in others", self._operands(complete))
        return states.pop() if states else SumState.COMPLETE

    def _operands(self, targets: Iterable[str]) -> set[str]:
        chosen = set(targets)
        return {name for s in self.program.statements if s.target in chosen for name in names_read(s.value)}

    def state(self, expr: Expr) -> SumState:
        """The state of an expression; raises NotLinear where a partial sum meets an operation that is not linear."""
        match expr:
            case Number(value=value):
                return SumState.ZERO if value == 0 and not isinstance(value, bool) else SumState.COMPLETE
            case DimRef(size=size):
                if self.is_divided(size):
                    raise NotLinear(f"it uses {size} as a number, which is divided over the ranks")
                return SumState.COMPLETE
            case Ref(name=name):
                return self.states.get(name, SumState.COMPLETE)
            case Reduce():
                return self._reduce(expr)
            case Dot():
                return self._dot(expr)
            case Scan(op=op, x=x, dim=dim) if self.is_divided(dim):
                raise NotLinear(f"`{op}` follows {dim}, which is divided over the ranks")
            case Scan(op="cumsum", x=x):
                return self.state(x)
            case TopK(dim=dim) if self.is_divided(dim):
                raise NotLinear(f"`topk` selects along {dim}, which is divided over the ranks")
            case IfPresent(name=name, a=a, b=b):
                known = self.present.get(name)
                return self._either(a, b) if known is None else self.state(a if known else b)
            case Select(condition=condition, a=a, b=b):
                self._require_complete(condition, "where")
                return self._either(a, b)
            case Cast(type=type_, x=x) if type_.element not in INTEGERS:
                return self.state(x)
            case Unary(op="neg", x=x):
                return self.state(x)
            case Binary(op="+" | "-", a=a, b=b):
                return self._either(a, b)
            case Binary(op="*" | "/" as op, a=a, b=b):
                return self._product(op, a, b)
            case Gather(table=table, index=index):
                self._require_complete(index, "gather")
                if self.is_divided(expr.dim):
                    raise NotLinear(f"`gather` indexes {expr.dim}, which is divided over the ranks")
                return self.state(table)
        return self._complete(expr)

    def _complete(self, expr: Expr) -> SumState:
        """Any other operation, which requires complete operands."""
        op = getattr(expr, "op", type(expr).__name__.lower())
        for child in children(expr):
            self._require_complete(child, str(op))
        return SumState.COMPLETE

    def _require_complete(self, expr: Expr, op: str) -> None:
        if self.state(expr) is SumState.PARTIAL:
            raise NotLinear(f"`{op}` is not linear")

    def _either(self, a: Expr, b: Expr) -> SumState:
        """A sum or a choice: both sides are complete or both are partial; zero fits either."""
        states = {self.state(a), self.state(b)} - {SumState.ZERO}
        if len(states) > 1:
            complete = a if self.state(a) is SumState.COMPLETE else b
            raise NotLinear("a complete value is added to a partial sum", names_read(complete))
        return states.pop() if states else SumState.ZERO

    def _product(self, op: str, a: Expr, b: Expr) -> SumState:
        left, right = self.state(a), self.state(b)
        if right is SumState.PARTIAL and (left is SumState.PARTIAL or op == "/"):
            raise NotLinear("it multiplies two partial sums" if op == "*" else "it divides by a partial sum")
        if SumState.ZERO in (left, right):
            return SumState.ZERO
        return SumState.PARTIAL if SumState.PARTIAL in (left, right) else SumState.COMPLETE

    def _reduce(self, expr: Reduce) -> SumState:
        state = self.state(expr.x)
        if not self.is_divided(expr.dim):
            if state is SumState.PARTIAL and expr.op not in ("sum", "mean"):
                raise NotLinear(f"`{expr.op}` is not linear")
            return state
        if expr.op != "sum" or state is SumState.PARTIAL:
            raise NotLinear(f"`{expr.op}` reduces {expr.dim}, which is divided over the ranks")
        return SumState.PARTIAL if state is SumState.COMPLETE else state

    def _dot(self, expr: Dot) -> SumState:
        state = self._product("*", expr.x, expr.w)
        if self.is_divided(expr.dim):
            if state is SumState.PARTIAL:
                raise NotLinear(f"`dot` contracts {expr.dim}, which is divided over the ranks, over a partial sum")
            return SumState.PARTIAL if state is SumState.COMPLETE else state
        return state
