"""Names of the generator inside kernels, kept apart from the names of the spec."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sageLLM.codegen.expr.size import LEADING
from sageLLM.codegen.kernel.rows import Let, RowProgram, Selection, Step, Store, Sweep
from sageLLM.codegen.model.op import OpDef, Operand


@dataclass(frozen=True, slots=True)
class OwnNames:
    """Names such as `row` or `x_rows`; one that the spec uses in this op gets a trailing underscore.

    Names with a capital letter (`i_H`, `in_H`, `x_R`) need no such care: the values of a spec are in small letters.
    """

    taken: frozenset[str]

    def __call__(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        return name


def own_names(op: OpDef, program: RowProgram | None = None) -> OwnNames:
    """The names that the operands and attrs of the op and the values of its program leave free."""
    declared = {one.name for one in (*op.inputs, *op.outputs)} | {attr.name for attr in op.attrs}
    steps = [step for nest in (program.nests if program is not None else ()) for step in nest.steps]
    return OwnNames(frozenset(declared | set(_value_names(steps)) | set(_stored_names(steps))))


def selection_names(program: RowProgram) -> list[str]:
    steps = [step for nest in program.nests for sweep in nest.sweeps for step in sweep.steps]
    return [step.name for step in steps if isinstance(step, Selection)]


def stride_name(operand: Operand, position: int) -> str:
    """`x_T` for the first dim of x: E[T, N, D]; the stride of a compound dim has the number of the dim, as in `x_D1`.

    The strides of an operand `i` are `i_stride_T`, as `i_T` is an index.
    """
    dim = operand.type.dims[position]
    suffix = "R" if dim == LEADING else dim.name or f"D{position}"
    return f"{'i_stride' if operand.name == 'i' else operand.name}_{suffix}"


def _value_names(steps: Iterable[Step]) -> Iterator[str]:
    for step in steps:
        if isinstance(step, Sweep):
            yield from (one.name for one in step.steps if not isinstance(one, Store))
            yield from (one.index_name for one in step.steps if isinstance(one, Selection))
        elif isinstance(step, Let):
            yield step.name


def _stored_names(steps: Iterable[Step]) -> Iterator[str]:
    """The operands that are stored: outputs, and values of a prologue in scratch memory."""
    for step in steps:
        inside = step.steps if isinstance(step, Sweep) else (step,)
        yield from (one.location.operand for one in inside if isinstance(one, Store))
