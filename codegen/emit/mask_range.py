"""Reads off a mask which keys a row can see at all, so that an attention kernel visits no others.

`n <= m and optional(window, n > m - window, true)` says: up to m, and from m - window + 1 on if there is a window. What
is not understood bounds nothing, and is evaluated for every pair of a query and a key.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sageLLM.codegen.expr.tree import AttrRef, Binary, Expr, IfPresent, Number, Ref, Unary


@dataclass(frozen=True, slots=True)
class MaskRange:
    """Bounds of the keys n of a row m, as Triton text; `unmasked` is when the upper bound is all that the mask says."""

    windows: tuple[tuple[str, bool], ...]  # the attr, and whether it also bounds the keys after m
    causal: str | None  # when a row sees nothing after itself; None if never
    unmasked: str

    def first(self, m: str) -> str:
        """The first key that rows from m on can see."""
        if not self.windows:
            return "0"
        [(window, _), *_] = self.windows
        return f"(tl.maximum({m} - {window} + 1, 0) if {window} is not None else 0)"

    def stop(self, m: str, length: str) -> str:
        """Where the keys end that rows up to m can see, of `length` keys."""
        stop = length if self.causal is None else f"tl.minimum({m} + 1, {length})"
        if self.causal not in (None, "True"):
            stop = f"({stop} if {self.causal} else {length})"
        for window, is_symmetric in self.windows:
            if is_symmetric:
                stop = f"(tl.minimum({m} + {window}, {stop}) if {window} is not None else {stop})"
        return stop


def mask_range(mask: Expr) -> MaskRange:
    """What the conjuncts of the mask say, each by itself."""
    windows: list[tuple[str, bool]] = []
    causal, unmasked = None, []
    for part in _conjuncts(mask):
        match part:
            case Binary() if _is_causal(part):
                causal = "True"
            case Binary(op="or", a=a, b=Unary(op="not", x=AttrRef(name=attr))) if _is_causal(a):
                causal = attr
            case IfPresent(name=name, a=a, b=Number(value=True)) if (is_symmetric := _window(a, name)) is not None:
                windows.append((name, is_symmetric))
                unmasked.append(f"{name} is None")
            case _:
                unmasked.append("False")
    return MaskRange(tuple(windows), causal, " and ".join(unmasked) or "True")


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
