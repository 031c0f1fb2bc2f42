"""Loop variables of a nest, and the positions along dims that they stand for."""

from collections.abc import Iterable, Mapping

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import Dot, Expr, Reduce, TopK, children
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.kernel.indexing import Positions, joined
from sageLLM.codegen.kernel.inline import unused_name
from sageLLM.codegen.kernel.rows import Affine, Loop, loop_name


class LoopVariables:
    """The variables of the rows and sweeps of a nest, one for each dim.

    `merged` are dims that a view merges from others: their position is that of the element in all of them.
    """

    def __init__(self, rows: tuple[Size, ...]) -> None:
        self.rows = rows
        self.merged: Mapping[Size, tuple[Size, ...]] = {}
        self._indices: dict[Expr, str] = {}
        self._variables: dict[Size, str] = {}
        self._loops = tuple(Loop(self.variable(dim), dim) for dim in rows)

    def variable(self, dim: Size) -> str:
        if dim not in self._variables:
            self._variables[dim] = unused_name(loop_name(dim), self._variables.values())
        return self._variables[dim]

    def positions(self, swept: Iterable[Size]) -> Positions:
        found = {dim: Affine.of(self.variable(dim)) for dim in (*self.rows, *swept)}
        for whole, parts in self.merged.items():
            if set(parts) <= found.keys():
                found[whole] = joined([(part, found[part]) for part in parts])
        return found

    def below_positions(self, expr: Expr, here: Positions) -> Positions:
        if not isinstance(expr, Reduce | Dot):
            return here
        return {**here, expr.dim: Affine.of(self.folded(expr.dim, here).variable)}

    def folded(self, dim: Size, here: Positions) -> Loop:
        """The loop of a reduction within a sweep, `j_H`: other than that of any sweep over the same dim."""
        taken = {name for at in here.values() for name in at.variables}
        return Loop(unused_name(f"j{loop_name(dim).removeprefix('i')}", taken), dim)

    def reduced(self, expr: Reduce | Dot | TopK, here: Positions) -> Loop:
        """The loop of a reduction or selection along the row.

        A dim of the rows, or of another position in scope, can be reduced as well: its variable is then another one,
        which makes values at its positions different from those of the row.
        """
        dims = [dim for child in children(expr) for dim in child.type.dims if dim != expr.dim and dim in here]
        taken = {name for dim in dims for name in here[dim].variables} | {loop.variable for loop in self._loops}
        name = self.variable(expr.dim)
        if name in taken:
            name = unused_name(name, taken | set(self._variables.values()) | set(self._indices.values()))
        return Loop(name, expr.dim)

    def is_local(self, type_: ValueType, here: Positions) -> bool:
        """Whether the element of a value at `here` is the one at the positions of the loops."""
        return all(dim in here and here[dim] == Affine.of(self.variable(dim)) for dim in type_.dims)

    def is_of_row(self, type_: ValueType, here: Positions) -> bool:
        """Whether a value is the same for the whole row."""
        return set(type_.dims) <= set(self.rows) and self.is_local(type_, here)
