"""Checks of every row program: element types of lanes, and safe in-place outputs."""

from collections.abc import Iterator, Mapping

from sageLLM.codegen.expr.tree import Expr, walk
from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.rows import Load, Nest, RowProgram, Step, Store, Sweep


def check_elements(program: RowProgram) -> None:
    """Kernels have vectors of f32, i32 and i64 only; narrower types are held in these."""
    for nest in program.nests:
        for step in nest.steps:
            if any(one.type.element == "f64" for expr in _values(step) for one in walk(expr)):
                raise LoweringError("it computes in f64")


def check_inplace(program: RowProgram, inplace: Mapping[str, str]) -> None:
    """An output may share the memory of an input if nothing is read there after it has been overwritten."""
    for output, input_ in inplace.items():
        is_written = False
        for nest in program.nests:
            if is_written and any(load.location.operand == input_ for step in nest.steps for load in _loads(step)):
                raise LoweringError(f"'{output}' reuses the memory of '{input_}', which is read after it is written")
            _check_nest(nest, output, input_)
            is_written |= any(store.location.operand == output for step in nest.steps for store in _stores(step))


def _check_nest(nest: Nest, output: str, input_: str) -> None:
    row_variables = {loop.variable for loop in nest.rows}
    stores = [store for step in nest.steps for store in _stores(step) if store.location.operand == output]
    if not stores:
        return
    rows = [at for at in stores[0].location.index if at.variables & row_variables]
    is_written = False
    for step in nest.steps:
        written = [store.location.index for store in _stores(step) if store.location.operand == output]
        for load in _loads(step):
            if load.location.operand != input_:
                continue
            if [at for at in load.location.index if at.variables & row_variables] != rows:
                raise LoweringError(f"'{output}' reuses the memory of '{input_}', which other rows read")
            if is_written and load.location.index not in written:
                raise LoweringError(f"'{output}' reuses the memory of '{input_}', which is read after it is written")
        is_written = is_written or bool(written)


def _stores(step: Step) -> list[Store]:
    inside = step.steps if isinstance(step, Sweep) else (step,)
    return [one for one in inside if isinstance(one, Store)]


def _values(step: Step) -> list[Expr]:
    return [one.value for one in (step.steps if isinstance(step, Sweep) else (step,)) if not isinstance(one, Sweep)]


def _loads(step: Step) -> Iterator[Load]:
    for value in _values(step):
        yield from (one for one in walk(value) if isinstance(one, Load))
