"""Row programs: an op as loops over rows, with sweeps along them, independent of the target.

    rms_norm:  rows i_R
                 sweep i_H:  xf = f32(x[i_R, i_H]);  ms <- mean of xf * xf
                 sweep i_H:  xf = f32(x[i_R, i_H]);  n = E(xf * rsqrt(ms + eps));  y[i_R, i_H] := n * w[i_H]

Rows are independent. A sweep is one pass over the elements of one inner dim; of its values per element, only stores and
reductions outlive it. A value that a later sweep needs is computed again, or reloaded if it is an output. A target that
keeps a whole row in registers can merge the sweeps of one dim, in order.
"""

from dataclasses import dataclass
from typing import TypeAlias

from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.tree import Expr, ReduceOp, ScanOp, TopPart


@dataclass(frozen=True, slots=True)
class Affine:
    """A position along a dim: offset + the sum of coefficient * variable, with the variables of loops and indices."""

    offset: Size
    terms: tuple[tuple[str, Size], ...] = ()

    @staticmethod
    def of(variable: str) -> "Affine":
        return Affine(Size.of(0), ((variable, Size.of(1)),))

    def scaled(self, factor: Size) -> "Affine":
        return Affine(self.offset * factor, tuple((variable, size * factor) for variable, size in self.terms))

    def __add__(self, other: "Affine") -> "Affine":
        terms = dict(self.terms)
        for variable, size in other.terms:
            terms[variable] = terms.get(variable, Size.of(0)) + size
        return Affine(self.offset + other.offset, tuple(terms.items()))

    @property
    def variables(self) -> frozenset[str]:
        return frozenset(variable for variable, _ in self.terms)


@dataclass(frozen=True, slots=True)
class Location:
    """The index of one element of an operand: a position for each of its declared dims; `...` counts as one dim, R."""

    operand: str
    index: tuple[Affine, ...]


@dataclass(frozen=True, slots=True)
class Load(Expr):
    """The element at a location, in the operand's element type. Leaves of the expressions of a row program."""

    location: Location


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop variable, which counts from 0 to the extent."""

    variable: str
    extent: Size


@dataclass(frozen=True, slots=True)
class Let:
    """A value by its name in the spec: of the row, or of an element within a sweep."""

    name: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Index:
    """An integer of the row that locations use as a variable: the position of a gather along a dim."""

    variable: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Fold:
    """A reduction over a dim that is not swept, for each element separately: `name` = op over `loop` of `value`."""

    name: str
    op: ReduceOp
    loop: Loop
    value: Expr


@dataclass(frozen=True, slots=True)
class Reduction:
    """The sweep's elements of `value` reduced to `name`, a value of the row from the sweep's end on."""

    name: str
    op: ReduceOp
    value: Expr


@dataclass(frozen=True, slots=True)
class Store:
    """`value` written to a location; every element of an output is stored exactly once."""

    location: Location
    value: Expr


@dataclass(frozen=True, slots=True)
class Running:
    """A scan: `name` is, for each element of the sweep, the reduction of `value` up to it."""

    name: str
    op: ScanOp
    value: Expr


@dataclass(frozen=True, slots=True)
class Selection:
    """The `k` largest of the sweep's elements of `value`, from the sweep's end on. `number` counts those of a nest."""

    name: str
    k: Loop
    value: Expr
    number: int

    @property
    def index_name(self) -> str:
        return f"{self.name}_index"


@dataclass(frozen=True, slots=True)
class Selected(Expr):
    """One part of a selection at the position of the sweep over its elements."""

    selection: str
    part: TopPart
    variable: str


InSweep: TypeAlias = Let | Fold | Reduction | Running | Selection | Store


@dataclass(frozen=True, slots=True)
class Sweep:
    """One pass along a row. The steps are in order; each may use the names of earlier ones."""

    loop: Loop
    steps: tuple[InSweep, ...]


Step: TypeAlias = Index | Let | Sweep | Store


@dataclass(frozen=True, slots=True)
class Nest:
    """Independent rows, one for each combination of the loop variables, and the steps of one row."""

    rows: tuple[Loop, ...]
    steps: tuple[Step, ...]

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        return tuple(step for step in self.steps if isinstance(step, Sweep))


@dataclass(frozen=True, slots=True)
class RowProgram:
    """A whole op. Several nests write different outputs, or different rows of one output."""

    nests: tuple[Nest, ...]


def loop_name(extent: Size) -> str:
    """`i_H` for H, `i_R` for the leading dims, `i_DDr` for D - Dr, `i_8` for 8; values of a spec are lower-case."""
    return "i_R" if extent == LEADING else f"i_{extent.name or ''.join(extent.symbols) or extent.constant}"
