"""The typed, target-independent expression tree that every kernel emitter reads."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.types import ValueType

UnaryOp = Literal[
    "neg", "not", "exp", "log", "sqrt", "rsqrt", "sigmoid", "tanh", "erf", "abs", "relu", "floor", "round"
]
BinaryOp = Literal[
    "+", "-", "*", "/", "//", "%", "**", "min", "max", "==", "!=", "<", "<=", ">", ">=", "and", "or"
]  # fmt: skip
ReduceOp = Literal["sum", "mean", "amax", "amin"]
ScanOp = Literal["cumsum", "cumprod", "cummax", "cummin"]
TopPart = Literal["values", "indices"]


@dataclass(frozen=True, slots=True)
class Expr:
    """A value. Its dims are in the default layout order; broadcasting is by dim name, never by position."""

    type: ValueType


@dataclass(frozen=True, slots=True)
class Ref(Expr):
    """An input, a view, or the result of an earlier statement."""

    name: str


@dataclass(frozen=True, slots=True)
class AttrRef(Expr):
    """An attr of the op, known when the kernel is called."""

    name: str


@dataclass(frozen=True, slots=True)
class DimRef(Expr):
    """A dim as a number."""

    size: Size


@dataclass(frozen=True, slots=True)
class Number(Expr):
    """A literal, which adopts the element type of the other operand."""

    value: bool | int | float | str


@dataclass(frozen=True, slots=True)
class Unary(Expr):
    op: UnaryOp
    x: Expr


@dataclass(frozen=True, slots=True)
class Binary(Expr):
    op: BinaryOp
    a: Expr
    b: Expr


@dataclass(frozen=True, slots=True)
class Select(Expr):
    """`where(condition, a, b)`, element by element."""

    condition: Expr
    a: Expr
    b: Expr


@dataclass(frozen=True, slots=True)
class Cast(Expr):
    """Rounding (to nearest even) or widening to the element type of `type`."""

    x: Expr


@dataclass(frozen=True, slots=True)
class Reduce(Expr):
    op: ReduceOp
    x: Expr
    dim: Size


@dataclass(frozen=True, slots=True)
class Scan(Expr):
    """The reduction of the elements up to each one, along `dim`; from the first NaN on it is NaN."""

    op: ScanOp
    x: Expr
    dim: Size


@dataclass(frozen=True, slots=True)
class TopK(Expr):
    """The `k` largest elements along `dim` in falling order, or their positions, which take the place of `dim`.

    NaN is larger than everything; of equal elements the one with the lower position comes first.
    """

    part: TopPart
    x: Expr
    dim: Size
    k: Size


@dataclass(frozen=True, slots=True)
class Dot(Expr):
    """Sum over `dim` of x * w, accumulated in float32."""

    x: Expr
    w: Expr
    dim: Size


@dataclass(frozen=True, slots=True)
class Gather(Expr):
    """`table` at `index` along `dim`; the dims of `index` replace `dim`."""

    table: Expr
    dim: Size
    index: Expr


@dataclass(frozen=True, slots=True)
class IfPresent(Expr):
    """`a` if the optional input or attr `name` is present, else `b`; decided when the kernel is called."""

    name: str
    a: Expr
    b: Expr


@dataclass(frozen=True, slots=True)
class Slice:
    """The range of one dim from `start` to `stop`; with a `step`, every step-th component, `length` in number."""

    start: Size
    stop: Size
    step: Size
    length: Size

    @property
    def base(self) -> Size:
        """The start of the whole steps: Dr for `Dr + 1:D:2`, the odd components from Dr on."""
        return self.start - Size.of(self.offset)

    @property
    def offset(self) -> int:
        """The position within a step of known size."""
        step = self.step.constant or 1
        return self.start.constant_term % step


@dataclass(frozen=True, slots=True)
class View:
    """A slice of an operand or of another view, reshaped if `shape` is not None. Moves no data."""

    name: str
    base: str
    base_type: ValueType
    slices: tuple[Slice | None, ...]  # one for each dim of the base; None is the whole dim
    shape: tuple[Size, ...] | None
    type: ValueType


@dataclass(frozen=True, slots=True)
class Statement:
    """`target = value`; the target is an output, a view of one, or a new name."""

    target: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Program:
    """The body of a `compute`: every output is assigned exactly once, whole or by views that tile it."""

    views: tuple[View, ...]
    statements: tuple[Statement, ...]

    def view(self, name: str) -> View | None:
        return next((view for view in self.views if view.name == name), None)

    def root(self, name: str) -> str:
        """The operand that a view, or a view of a view, shows; any other name as it is."""
        return root_of(self.views, name)


def root_of(views: Iterable[View], name: str) -> str:
    """The operand that a view, or a view of a view, shows; any other name as it is."""
    bases = {view.name: view.base for view in views}
    while name in bases:
        name = bases[name]
    return name


def children(expr: Expr) -> tuple[Expr, ...]:
    match expr:
        case Unary(x=x) | Cast(x=x) | Reduce(x=x) | Scan(x=x) | TopK(x=x):
            return (x,)
        case Binary(a=a, b=b) | IfPresent(a=a, b=b):
            return (a, b)
        case Select(condition=condition, a=a, b=b):
            return (condition, a, b)
        case Dot(x=x, w=w):
            return (x, w)
        case Gather(table=table, index=index):
            return (table, index)
    return ()


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything below it, outermost first."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def names_read(expr: Expr) -> set[str]:
    """Operands, attrs and earlier results that the value depends on."""
    return {node.name for node in walk(expr) if isinstance(node, Ref | AttrRef | IfPresent)}
