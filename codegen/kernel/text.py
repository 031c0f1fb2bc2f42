"""Row programs as text, for reading and for tests."""

from collections.abc import Iterator

from sageLLM.codegen.expr.size import LEADING, Size
from sageLLM.codegen.expr.tree import (
    AttrRef,
    Binary,
    Cast,
    DimRef,
    Expr,
    IfPresent,
    Number,
    Ref,
    Select,
    Unary,
)
from sageLLM.codegen.kernel.rows import (
    Affine,
    Fold,
    Index,
    Let,
    Load,
    Location,
    Loop,
    Reduction,
    RowProgram,
    Running,
    Selected,
    Selection,
    Store,
    Sweep,
)


def row_text(program: RowProgram) -> str:
    """All nests in order, each as its rows and the steps of one row."""
    return "\n".join(line for nest in program.nests for line in [_rows(nest.rows), *_steps(nest.steps, "  ")]) + "\n"


def _rows(loops: tuple[Loop, ...]) -> str:
    return "rows " + ", ".join(_loop(loop) for loop in loops)


def _loop(loop: Loop) -> str:
    return f"{loop.variable} < {'R' if loop.extent == LEADING else loop.extent}"


def _steps(steps: tuple[object, ...], indent: str) -> Iterator[str]:
    for step in steps:
        match step:
            case Index(variable=variable, value=value):
                yield f"{indent}{variable} = {expr_text(value)}"
            case Let(name=name, value=value):
                yield f"{indent}{name} = {expr_text(value)}"
            case Fold(name=name, op=op, loop=loop, value=value):
                yield f"{indent}{name} = {op} over {_loop(loop)} of {expr_text(value)}"
            case Reduction(name=name, op=op, value=value):
                yield f"{indent}{name} <- {op} of {expr_text(value)}"
            case Running(name=name, op=op, value=value):
                yield f"{indent}{name} = {op} of {expr_text(value)}"
            case Selection(name=name, k=k, value=value):
                yield f"{indent}{name} <- top {k.extent} of {expr_text(value)}"
            case Store(location=location, value=value):
                yield f"{indent}{location_text(location)} := {expr_text(value)}"
            case Sweep(loop=loop, steps=inner):
                yield f"{indent}sweep {_loop(loop)}"
                yield from _steps(inner, indent + "  ")


def location_text(location: Location) -> str:
    return f"{location.operand}[{', '.join(affine_text(at) for at in location.index)}]"


def affine_text(at: Affine) -> str:
    terms = [name if size == Size.of(1) else f"{size}*{name}" for name, size in at.terms]
    return " + ".join([*([str(at.offset)] if at.offset != Size.of(0) or not terms else []), *terms])


def expr_text(expr: Expr) -> str:
    match expr:
        case Load(location=location):
            return location_text(location)
        case Selected(selection=name, part=part, variable=variable):
            return f"{name}{'' if part == 'values' else '.index'}[{variable}]"
        case Ref(name=name) | AttrRef(name=name):
            return name
        case DimRef(size=size):
            return str(size)
        case Number(value=value):
            return repr(value)
        case Unary(op=op, x=x):
            return f"{op}({expr_text(x)})"
        case Cast(type=type_, x=x):
            return f"{type_.element}({expr_text(x)})"
        case Binary(op="min" | "max" as op, a=a, b=b):
            return f"{op}({expr_text(a)}, {expr_text(b)})"
        case Binary(op=op, a=a, b=b):
            return f"({expr_text(a)} {op} {expr_text(b)})"
        case Select(condition=condition, a=a, b=b):
            return f"where({expr_text(condition)}, {expr_text(a)}, {expr_text(b)})"
        case IfPresent(name=name, a=a, b=b):
            return f"({expr_text(a)} if {name} else {expr_text(b)})"
    raise AssertionError(f"a row program holds no {type(expr).__name__}")
