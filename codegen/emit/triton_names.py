"""Names of the generator inside Triton kernels and launchers, kept apart from the names of the spec."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sageLLM.codegen.kernel.rows import Fold, Let, Loop, Reduction, RowProgram, Step, Sweep
from sageLLM.codegen.model.op import OpDef


@dataclass(frozen=True, slots=True)
class OwnNames:
    """Names such as `tile` or `x_rows`; one that the spec uses in this op gets a trailing underscore.

    Names with a capital letter (`i_H`, `in_H`, `x_R`) need no such care: the values of a spec are in small letters.
    """

    taken: frozenset[str]

    def __call__(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        return name


def own_names(op: OpDef, program: RowProgram) -> OwnNames:
    """The names that the operands, attrs and values of the op leave free."""
    declared = {one.name for one in (*op.inputs, *op.outputs)} | {attr.name for attr in op.attrs}
    return OwnNames(frozenset(declared | set(_value_names(step for nest in program.nests for step in nest.steps))))


def _value_names(steps: Iterable[Step]) -> Iterator[str]:
    for step in steps:
        if isinstance(step, Sweep):
            yield from (one.name for one in step.steps if isinstance(one, Let | Fold | Reduction))
        elif isinstance(step, Let):
            yield step.name


def index_name(variable: str) -> str:
    """`i_H` for the loop variable `iH` of a row program."""
    return f"i_{variable[1:]}"


def inside_name(loop: Loop) -> str:
    """`in_H`, the mask of the columns that exist."""
    return f"in_{loop.variable[1:]}"


def block_name(loop: Loop) -> str:
    """`BLOCK_H`, the number of columns that a program holds at once."""
    return f"BLOCK_{loop.variable[1:]}"
