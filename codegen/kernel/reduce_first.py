"""Rows that are one reduced number, and then sweeps that need it: a norm, but not a softmax.

    reduce:  sweep i_H:  xf = f32(x[i_R, i_H]);  ms <- mean of xf * xf
    finish:  sweep i_H:  ...;  y[i_R, i_H] := n * w[i_H]

A kernel may reduce the next row before it finishes this one: the additions of a reduction wait for each other, and a
processor multiplies the elements of a row meanwhile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sageLLM.codegen.expr.tree import Expr, names_read
from sageLLM.codegen.kernel.rows import Index, Let, Nest, Reduction, Selection, Step, Store, Sweep

_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class ReduceFirst:
    """The steps up to the last reduction, the steps after it, and the only value that these take from the first."""

    reduce: tuple[Step, ...]
    value: str
    finish: tuple[Step, ...]


def reduce_first(nest: Nest) -> ReduceFirst | None:
    """The two parts of a row, or None: no reduction, no sweep after it, or more than one float that is needed later."""
    last = max((i for i, step in enumerate(nest.steps) if _reductions(step)), default=None)
    selections = [one for sweep in nest.sweeps for one in sweep.steps if isinstance(one, Selection)]
    if last is None or not nest.rows or selections:
        return None
    first, rest = nest.steps[: last + 1], nest.steps[last + 1 :]
    if not any(isinstance(step, Sweep) for step in rest) or _stored(first) & _stored(rest):
        return None
    read = {name for step in rest for value in _values(step) for name in names_read(value)}
    handed = [(name, value) for name, value in _row_values(first) if name in read]
    if len(handed) != 1 or handed[0][1].type.element not in _FLOATS:
        return None
    return ReduceFirst(first, handed[0][0], (*(step for step in first if isinstance(step, Index)), *rest))


def _reductions(step: Step) -> list[Reduction]:
    return [one for one in step.steps if isinstance(one, Reduction)] if isinstance(step, Sweep) else []


def _stored(steps: tuple[Step, ...]) -> set[str]:
    """The operands that are stored; one that both parts store may be a row of a cache, which is stored as a whole."""
    inside = [one for step in steps for one in (step.steps if isinstance(step, Sweep) else (step,))]
    return {one.location.operand for one in inside if isinstance(one, Store)}


def _row_values(steps: tuple[Step, ...]) -> Iterator[tuple[str, Expr]]:
    """The values of the row that later steps can name."""
    for step in steps:
        if isinstance(step, Let):
            yield step.name, step.value
        yield from ((one.name, one.value) for one in _reductions(step))


def _values(step: Step) -> Iterator[Expr]:
    for one in step.steps if isinstance(step, Sweep) else (step,):
        yield one.value
