"""Bounds of the keys that a mask leaves visible, so that an attention kernel visits no others.

`n <= m and optional(window, n > m - window, true)` means: up to m, and from m - window + 1 on if a window is present;
`optional(chunk, n >= m - m % chunk, true)`: from the first key of m's chunk on, if there are chunks. A conjunct of
another form bounds nothing, and is evaluated for every pair of a query and a key. If all conjuncts are bounds, the
bounds are equivalent to the mask, and pairs within them need no test.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sageLLM.codegen.expr.tree import AttrRef, Binary, Expr, IfPresent, Number, Ref, Unary


@dataclass(frozen=True, slots=True)
class Window:
    """`attr` limits the distance to keys before the row and, if `is_symmetric`, to keys after it."""

    attr: str
    is_symmetric: bool


@dataclass(frozen=True, slots=True)
class MaskBounds:
    """Windows and chunks, each if its attr is present, and causality `n <= m`, always or if an attr is true.

    `is_exact`: the bounds are equivalent to the mask.
    """

    windows: tuple[Window, ...]
    chunks: tuple[str, ...]
    is_causal: bool
    causal_attr: str | None
    is_exact: bool


def mask_bounds(mask: Expr) -> MaskBounds:
    """The bounds in the conjuncts of the mask."""
    windows: list[Window] = []
    chunks: list[str] = []
    is_causal, causal_attr, is_exact = False, None, True
    for part in _conjuncts(mask):
        match part:
            case Binary() if _is_causal(part):
                is_causal = True
            case Binary(op="or", a=a, b=Unary(op="not", x=AttrRef(name=attr))) if _is_causal(a):
                causal_attr = attr
            case IfPresent(name=name, a=a, b=Number(value=True)) if (is_symmetric := _window(a, name)) is not None:
                windows.append(Window(name, is_symmetric))
            case IfPresent(name=name, a=a, b=Number(value=True)) if _is_chunk(a, name):
                chunks.append(name)
            case Number(value=True):
                pass
            case _:
                is_exact = False
    return MaskBounds(tuple(windows), tuple(chunks), is_causal, causal_attr, is_exact)


def _conjuncts(mask: Expr) -> Iterator[Expr]:
    if isinstance(mask, Binary) and mask.op == "and":
        yield from _conjuncts(mask.a)
        yield from _conjuncts(mask.b)
    else:
        yield mask


def _is_causal(condition: Expr) -> bool:
    match condition:
        case Binary(op="<=", a=Ref(name="n"), b=Ref(name="m")):
            return True
    return False


def _window(condition: Expr, attr: str) -> bool | None:
    """False for `n > m - attr`, True for `abs(m - n) < attr`, which bounds the keys on both sides; otherwise None."""
    match condition:
        case Binary(op=">", a=Ref(name="n"), b=Binary(op="-", a=Ref(name="m"), b=AttrRef(name=name))):
            return False if name == attr else None
        case Binary(op="<", a=Unary(op="abs", x=Binary(op="-", a=Ref(), b=Ref())), b=AttrRef(name=name)):
            return True if name == attr else None
    return None


def _is_chunk(condition: Expr, attr: str) -> bool:
    """`n >= m - m % attr`: keys from the first one of the query's chunk on."""
    match condition:
        case Binary(
            op=">=",
            a=Ref(name="n"),
            b=Binary(op="-", a=Ref(name="m"), b=Binary(op="%", a=Ref(name="m"), b=AttrRef(name=name))),
        ):
            return name == attr
    return False
