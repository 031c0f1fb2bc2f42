"""The definitions of one op that the lowering reads: operands, views, and the values of its equations."""

from collections.abc import Iterator

from sageLLM.codegen.expr.tree import Expr, Program, Ref, View, walk
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.kernel.indexing import Positions, base_index
from sageLLM.codegen.model.op import OpDef


class Definitions:
    """Names of an op and their meanings; `read` are the names that some value uses.

    With `reloads` a sweep may load what an earlier one has stored.
    """

    def __init__(self, op: OpDef, program: Program, *, reloads: bool = True) -> None:
        self.op, self.program, self.reloads = op, program, reloads
        self.inputs = {o.name: o.type for o in op.inputs}
        self.outputs = {o.name: o.type for o in op.outputs}
        self.views = {view.name: view for view in program.views}
        self.values = {s.target: s.value for s in program.statements}
        self.read = {one.name for s in program.statements for one in walk(s.value) if isinstance(one, Ref)}

    def target_type(self, target: str) -> ValueType:
        return self.outputs[target] if target in self.outputs else self.views[target].type

    def is_stored(self, target: str) -> bool:
        return self.program.root(target) in self.outputs

    def ancestors(self, view: View) -> Iterator[str]:
        """The base of a view, the base of that, and so on."""
        base = view.base
        yield base
        while base in self.views:
            base = self.views[base].base
            yield base

    def index_in(self, view: View, ancestor: str, here: Positions) -> Positions:
        """The positions along the dims of a base of the view, or of a base of that, for the element at `here`."""
        positions = dict(zip(view.base_type.dims, base_index(view, here), strict=True))
        return positions if view.base == ancestor else self.index_in(self.views[view.base], ancestor, positions)

    def below(self, value: Expr) -> Iterator[Expr]:
        """The expression and all expressions that it depends on."""
        for one in walk(value):
            yield one
            if isinstance(one, Ref) and one.name in self.values:
                yield from self.below(self.values[one.name])
