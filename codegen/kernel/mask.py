"""Reads off a mask which keys a row can see at all, so that an attention kernel visits no others.

`n <= m and optional(window, n > m - window, true)` says: up to m, and from m - window + 1 on if there is a window. What
is not understood bounds nothing, and is evaluated for every pair of a query and a key. If all is understood, the bounds
are the mask, and pairs that lie within them need no test.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sageLLM.codegen.expr.tree import AttrRef, Binary, Expr, IfPresent, Number, Ref, Unary


@dataclass(frozen=True, slots=True)
class Window:
    """`attr` bounds how far before a row its keys begin, and if `is_symmetric` how far behind it they end."""

    attr: str
    is_symmetric: bool


@dataclass(frozen=True, slots=True)
class MaskBounds:
    """What bounds the keys: windows where they are given, and `n <= m`, always or where an attr says so.

    `is_exact`: the mask says nothing else.
    """

    windows: tuple[Window, ...]
    is_causal: bool
    causal_attr: str | None
    is_exact: bool


def mask_bounds(mask: Expr) -> MaskBounds:
    """What the conjuncts of the mask say, each by itself."""
    windows: list[Window] = []
    is_causal, causal_attr, is_exact = False, None, True
    for part in _conjuncts(mask):
        match part:
            case Binary() if _is_causal(part):
                is_causal = True
            case Binary(op="or", a=a, b=Unary(op="not", x=AttrRef(name=attr))) if _is_causal(a):
                causal_attr = attr
            case IfPresent(name=name, a=a, b=Number(value=True)) if (is_symmetric := _window(a, name)) is not None:
                windows.append(Window(name, is_symmetric))
            case Number(value=True):
                pass
            case _:
                is_exact = False
    return MaskBounds(tuple(windows), is_causal, causal_attr, is_exact)


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
    """False for `n > m - attr`, True for `abs(m - n) < attr`, which bounds the keys on both sides; else None."""
    match condition:
        case Binary(op=">", a=Ref(name="n"), b=Binary(op="-", a=Ref(name="m"), b=AttrRef(name=name))):
            return False if name == attr else None
        case Binary(op="<", a=Unary(op="abs", x=Binary(op="-", a=Ref(), b=Ref())), b=AttrRef(name=name)):
            return True if name == attr else None
    return None
