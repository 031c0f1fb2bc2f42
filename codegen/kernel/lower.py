"""Lowers the equations of an op to a row program: chooses the rows and the swept dim of each stored statement."""

from dataclasses import replace

from sageLLM.codegen.expr.size import Size
from sageLLM.codegen.expr.tree import Dot, Expr, Reduce, Ref, Scan, Statement, TopK, walk
from sageLLM.codegen.kernel.check import check_elements, check_inplace
from sageLLM.codegen.kernel.definitions import Definitions
from sageLLM.codegen.kernel.indexing import LoweringError, merged_dims
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.nest import Domain, NestBuilder
from sageLLM.codegen.kernel.rows import RowProgram
from sageLLM.codegen.kernel.scatter import Scatter
from sageLLM.codegen.model.op import OpDef


def row_program(op: OpDef, programs: Programs, *, reloads: bool = True) -> RowProgram:
    """The op as loops. Raises LoweringError with the reason for an op that cannot be lowered.

    Without `reloads` a sweep computes again what an earlier one has stored: several programs may compute a row, and
    none reads what another one stores.
    """
    is_cached = reloads and not programs.is_variant(op)
    known = programs.row_programs.get(op.name)
    if known is not None and is_cached:
        return known
    program = programs.of(op)
    if program is None:
        raise LoweringError("it is defined by a reference, not by equations")
    rows = _Lowering(op, program, reloads=reloads).lower()
    if is_cached:
        programs.row_programs[op.name] = rows
    return rows


def why_not_lowered(op: OpDef, programs: Programs) -> str | None:
    """The reason why the op cannot be lowered to a row program, or None if it can."""
    try:
        row_program(op, programs)
    except LoweringError as error:
        return str(error)
    return None


class _Lowering(Definitions):
    """The lowering of one op. Statements that store are grouped into nests; others are computed at their uses."""

    def lower(self) -> RowProgram:
        nests: list[NestBuilder] = []
        for statement in self.program.statements:
            if not self.is_stored(statement.target):
                continue
            for part in self._parts_of(statement):
                domain = self._domain(part)
                if not nests or nests[-1].rows != domain.rows:
                    nests.append(NestBuilder(self, domain.rows))
                nests[-1].store(part, domain)
        program = RowProgram(tuple(nest.nest() for nest in nests))
        check_elements(program)
        check_inplace(program, self.op.inplace)
        return program

    def _parts_of(self, statement: Statement) -> list[Statement]:
        """The statement, or one per part if its value combines parts: each part has its own positions."""
        value = statement.value
        if not isinstance(value, Ref) or value.name in self.values or value.name in self.inputs:
            return [statement]
        of_value = [view for view in self.program.views if value.name in self.ancestors(view)]
        parts = [view for view in of_value if view.name in self.values]
        return [replace(statement, value=Ref(view.type, view.name)) for view in parts] or [statement]

    def _domain(self, statement: Statement) -> Domain:
        type_ = statement.value.type if isinstance(statement, Scatter) else self.target_type(statement.target)
        if type_.element == "f64":
            raise LoweringError("it stores f64")
        merged = self._merged(statement.value)
        dims = tuple(part for dim in type_.dims for part in merged.get(dim, (dim,)))
        if not dims:
            return Domain((), None, merged)
        swept = self._required_sweep(statement.value)
        if swept is not None:
            is_kept = swept in dims
            return Domain(tuple(dim for dim in dims if dim != swept), swept if is_kept else None, merged)
        inner = dims[-1]
        if any(self._prefers(one, inner) for one in self.below(statement.value) if isinstance(one, Reduce | Dot)):
            return Domain(dims, None, merged)
        return Domain(dims[:-1], inner, merged)

    def _required_sweep(self, value: Expr) -> Size | None:
        """The dim that must be swept: that of a scan, or of the elements that a `topk` selects."""
        below = list(self.below(value))
        found = {one.dim for one in below if isinstance(one, Scan)} | {one.k for one in below if isinstance(one, TopK)}
        if len(found) > 1:
            raise LoweringError(f"it scans or selects along several dims: {', '.join(sorted(map(str, found)))}")
        return found.pop() if found else None

    def _merged(self, value: Expr) -> dict[Size, tuple[Size, ...]]:
        found: dict[Size, tuple[Size, ...]] = {}
        for one in self.below(value):
            if isinstance(one, Ref) and one.name in self.views:
                found |= merged_dims(self.views[one.name])
        return found

    def _prefers(self, reduction: Reduce | Dot, inner: Size) -> bool:
        """Whether to sweep the reduced dim, with a row per element of `inner`: operands are contiguous along it."""
        if inner not in reduction.type.dims:
            return False
        operands = [reduction.x] if isinstance(reduction, Reduce) else [reduction.x, reduction.w]
        leaves = [one for operand in operands for one in walk(operand) if isinstance(one, Ref) and one.type.dims]
        last = [leaf.type.dims[-1] for leaf in leaves]
        return last.count(reduction.dim) > last.count(inner)
