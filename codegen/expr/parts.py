"""What a program makes of a sum's parts: each rank has one, and the program may run before they are added up.

That is right where the program is linear in what is a part: the parts of its result then add up to the result. Sums
over a dim of which each rank has a share give such parts in the first place.
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
    Select,
    Unary,
    children,
    names_read,
)
from sageLLM.codegen.expr.types import INTEGERS


class Share(Enum):
    """What one rank has of a value: all that it needs of it, a summand of it, or nothing but zeros."""

    WHOLE = "whole"
    PART = "part"
    ZERO = "zero"


class NotLinear(Exception):
    """The parts of the result would not add up. `added` are whole operands that are added to a part, if that is why."""

    def __init__(self, message: str, added: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.added = frozenset(added)


@dataclass(slots=True)
class PartChecker:
    """Goes through the statements of one program.

    `shares` is what a rank has of each operand, `is_divided` says of which dims a rank has a share, and `given` whether
    an optional operand or attr is there (None where that is not known).
    """

    program: Program
    shares: dict[str, Share]
    is_divided: Callable[[Size], bool]
    given: Mapping[str, bool | None]

    def outputs(self, names: Iterable[str]) -> dict[str, Share]:
        """What a rank has of each output; raises NotLinear where that is of no use."""
        for view in self.program.views:
            if view.base in self.shares:
                self.shares[view.name] = self.shares[view.base]
        for statement in self.program.statements:
            self.shares[statement.target] = self.share(statement.value)
        return {name: self._output(name) for name in names}

    def _output(self, name: str) -> Share:
        parts = [view.name for view in self.program.views if view.base == name and view.name in self.shares]
        shares = {self.shares[part] for part in ([name] if name in self.shares else parts)} - {Share.ZERO}
        if len(shares) > 1:
            whole = [part for part in parts if self.shares[part] is Share.WHOLE]
            raise NotLinear(f"'{name}' is whole in some places and a part in others", self._operands(whole))
        return shares.pop() if shares else Share.WHOLE

    def _operands(self, targets: Iterable[str]) -> set[str]:
        wanted = set(targets)
        return {name for s in self.program.statements if s.target in wanted for name in names_read(s.value)}

    def share(self, expr: Expr) -> Share:
        match expr:
            case Number(value=value):
                return Share.ZERO if value == 0 and not isinstance(value, bool) else Share.WHOLE
            case DimRef(size=size):
                if self.is_divided(size):
                    raise NotLinear(f"it computes with {size}, of which a rank has a share")
                return Share.WHOLE
            case Ref(name=name):
                return self.shares.get(name, Share.WHOLE)
            case Reduce():
                return self._reduce(expr)
            case Dot():
                return self._dot(expr)
            case IfPresent(name=name, a=a, b=b):
                known = self.given.get(name)
                return self._either(a, b) if known is None else self.share(a if known else b)
            case Select(condition=condition, a=a, b=b):
                self._want_whole(condition, "where")
                return self._either(a, b)
            case Cast(type=type_, x=x) if type_.element not in INTEGERS:
                return self.share(x)
            case Unary(op="neg", x=x):
                return self.share(x)
            case Binary(op="+" | "-", a=a, b=b):
                return self._either(a, b)
            case Binary(op="*" | "/" as op, a=a, b=b):
                return self._product(op, a, b)
            case Gather(table=table, index=index):
                self._want_whole(index, "gather")
                if self.is_divided(expr.dim):
                    raise NotLinear(f"it looks up rows along {expr.dim}, of which a rank has a share")
                return self.share(table)
        return self._whole(expr)

    def _whole(self, expr: Expr) -> Share:
        """Any other function: of whole values only."""
        op = getattr(expr, "op", type(expr).__name__.lower())
        for child in children(expr):
            self._want_whole(child, str(op))
        return Share.WHOLE

    def _want_whole(self, expr: Expr, op: str) -> None:
        if self.share(expr) is Share.PART:
            raise NotLinear(f"`{op}` is not linear")

    def _either(self, a: Expr, b: Expr) -> Share:
        """Of a sum or of a choice: both sides are whole, or both are parts; zeros fit to either."""
        shares = {self.share(a), self.share(b)} - {Share.ZERO}
        if len(shares) > 1:
            whole = a if self.share(a) is Share.WHOLE else b
            raise NotLinear("a whole value is added", names_read(whole))
        return shares.pop() if shares else Share.ZERO

    def _product(self, op: str, a: Expr, b: Expr) -> Share:
        left, right = self.share(a), self.share(b)
        if right is Share.PART and (left is Share.PART or op == "/"):
            raise NotLinear("two parts are multiplied" if op == "*" else "it divides by a part")
        if Share.ZERO in (left, right):
            return Share.ZERO
        return Share.PART if Share.PART in (left, right) else Share.WHOLE

    def _reduce(self, expr: Reduce) -> Share:
        share = self.share(expr.x)
        if not self.is_divided(expr.dim):
            if share is Share.PART and expr.op not in ("sum", "mean"):
                raise NotLinear(f"`{expr.op}` is not linear")
            return share
        if expr.op != "sum" or share is Share.PART:
            raise NotLinear(f"`{expr.op}` goes over {expr.dim}, of which a rank has a share")
        return Share.PART if share is Share.WHOLE else share

    def _dot(self, expr: Dot) -> Share:
        share = self._product("*", expr.x, expr.w)
        if self.is_divided(expr.dim):
            if share is Share.PART:
                raise NotLinear(f"`dot` goes over {expr.dim}, of which a rank has a share, and over parts")
            return Share.PART if share is Share.WHOLE else share
        return share
