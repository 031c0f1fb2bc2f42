"""Reductions, scans and their results of no elements, as Triton."""

from sageLLM.codegen.expr.tree import Expr
from sageLLM.codegen.expr.types import INTEGERS
from sageLLM.codegen.kernel.rows import Fold, Reduction, Running

_EMPTY = {"sum": "0.0", "prod": "1.0", "mean": "0.0", "amax": 'float("-inf")', "amin": 'float("inf")'}
_EMPTY_I8 = {"amax": "-128", "amin": "127"}
EMPTY_I32 = {"sum": "0", "prod": "1", "amax": str(-(2**31)), "amin": str(2**31 - 1)}
EMPTY_I64 = {"sum": "0", "prod": "1", "amax": str(-(2**63)), "amin": str(2**63 - 1)}
ROW_FORM = {"sum": "tl.sum", "mean": "tl.sum", "amax": "device.amax", "amin": "device.amin"}
INTEGER_FORM = {"sum": "tl.sum", "amax": "tl.max", "amin": "tl.min"}
JOIN = {
    "sum": "{0} += {1}",
    "prod": "{0} *= {1}",
    "mean": "{0} += {1}",
    "amax": "{0} = tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "amin": "{0} = tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}
OF_SCAN = {"cumsum": "sum", "cumprod": "prod", "cummax": "amax", "cummin": "amin"}
SCAN = {
    "cumsum": "tl.cumsum({0}, 1)",
    "cumprod": "tl.cumprod({0}, 1)",
    "cummax": "device.cummax({0}, 1)",
    "cummin": "device.cummin({0}, 1)",
}
INTEGER_SCAN = SCAN | {
    "cummax": "tl.associative_scan({0}, 1, device.larger)",
    "cummin": "tl.associative_scan({0}, 1, device.smaller)",
}
INTEGER_JOIN = {
    "sum": "{0} += {1}",
    "prod": "{0} *= {1}",
    "amax": "{0} = tl.maximum({0}, {1})",
    "amin": "{0} = tl.minimum({0}, {1})",
}


def accumulated(value: Expr) -> str:
    """The type that a value is reduced in."""
    return {"i8": "tl.int32", "i32": "tl.int32", "i64": "tl.int64"}.get(value.type.element, "tl.float32")


def empty_text(step: Reduction | Fold | Running) -> str:
    """The result of no elements, which elements outside the row are replaced by."""
    tables = {"i8": _EMPTY_I8, "i32": EMPTY_I32, "i64": EMPTY_I64}
    op = OF_SCAN[step.op] if isinstance(step, Running) else step.op
    return tables.get(step.value.type.element, _EMPTY)[op]


def join_text(step: Reduction | Fold) -> str:
    return (INTEGER_JOIN if step.value.type.element in INTEGERS else JOIN)[step.op]
