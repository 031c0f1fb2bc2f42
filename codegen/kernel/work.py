"""The arithmetic of row programs, including values that a kernel computes several times."""

from collections.abc import Iterable

from sageLLM.codegen.expr.size import Size, volume
from sageLLM.codegen.expr.tree import Binary, Expr, IfPresent, Ref, Select, Unary, children
from sageLLM.codegen.kernel.rows import Fold, Let, Load, Nest, Reduction, RowProgram, Running, Step, Store, Sweep

ZERO, ONE = Size.of(0), Size.of(1)


def row_flops(program: RowProgram) -> Size:
    """One for each arithmetic operation on an element, as in `expr.cost`, each time that it is done."""
    return _sum(map(_nest, program.nests))


def _nest(nest: Nest) -> Size:
    return volume(loop.extent for loop in nest.rows) * _sum(map(_step, nest.steps))


def _step(step: Step) -> Size:
    return _sweep(step) if isinstance(step, Sweep) else _Counter(frozenset(), set(), ONE).flops(step.value)


def _sweep(sweep: Sweep) -> Size:
    counter, total = _Counter(frozenset([sweep.loop.variable]), set(), sweep.loop.extent), ZERO
    for step in sweep.steps:
        if isinstance(step, Fold):
            inside = _Counter(counter.variables | {step.loop.variable}, counter.varying, ONE)
            total += sweep.loop.extent * step.loop.extent * (inside.flops(step.value) + ONE)
        else:
            total += counter.flops(step.value)
        total += sweep.loop.extent if isinstance(step, Reduction | Running) else ZERO
        if not isinstance(step, Store) and (not isinstance(step, Let) or counter.varies(step.value)):
            counter.varying.add(step.name)
    return total


class _Counter:
    """Counts at one point of a nest: operations on values that vary along the sweep `times`, others once per row."""

    def __init__(self, variables: frozenset[str], varying: set[str], times: Size) -> None:
        self.variables, self.varying, self.times = variables, varying, times

    def varies(self, expr: Expr) -> bool:
        match expr:
            case Load(location=location):
                return any(at.variables & self.variables for at in location.index)
            case Ref(name=name):
                return name in self.varying
        return any(map(self.varies, children(expr)))

    def flops(self, expr: Expr) -> Size:
        if isinstance(expr, IfPresent):
            present, absent = self.flops(expr.a), self.flops(expr.b)
            return absent + Size.symbol(f"has_{expr.name}") * (present - absent)
        is_operation = isinstance(expr, Unary | Binary | Select) and not expr.type.is_literal
        own = (self.times if self.varies(expr) else ONE) if is_operation else ZERO
        return own + _sum(map(self.flops, children(expr)))


def _sum(sizes: Iterable[Size]) -> Size:
    return sum(sizes, ZERO)
