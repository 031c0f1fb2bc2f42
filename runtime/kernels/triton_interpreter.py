"""Makes Triton's interpreter compute bf16 as a GPU does, for checks on machines without one.

The interpreter holds bf16 as its 16 bits in a numpy integer. Up to version 3.9 it hands these integers to numpy's
arithmetic as they are, and cuts float32 down to bf16 instead of rounding it. `mend` widens bf16 operands to float32,
which is exact, lets the interpreter compute, and rounds to nearest even where the result is bf16.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The bf16 numbers with these bits: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """The bits of the nearest bf16 numbers, of two equally near the even one; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    carry = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(x), np.uint16(0x7FC0), ((bits + carry) >> 16).astype(np.uint16))


def mend() -> None:
    """Replaces the builder's operations on numbers; call it once, after the first import of Triton."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16

    def wide(x: Any) -> Any:
        return handle(widened(x.data), tl.float32) if is_bf16(x) else x

    def narrow(x: Any) -> Any:
        return handle(narrowed(x.data), tl.bfloat16) if x.data.dtype.kind == "f" else x

    def computed(name: str) -> Callable[..., Any]:
        """The operation over float32, its result rounded if an operand was bf16; what compares gives no number."""
        original = getattr(builder, name)

        def operation(self: Any, *operands: Any) -> Any:
            result = original(self, *map(wide, operands))
            return narrow(result) if any(map(is_bf16, operands)) else result

        return operation

    def cast(self: Any, x: Any, target: Any, *rest: Any) -> Any:
        x = wide(x)
        if target.scalar != tl.bfloat16:
            return original_cast(self, x, target)
        return handle(narrowed(x.data.astype(np.float32)), tl.bfloat16)

    original_cast, original_dot = builder.cast_impl, builder.create_dot
    builder.create_dot = lambda self, a, b, *rest: original_dot(self, wide(a), wide(b), *rest)
    for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_fabs", "create_clampf"):
        setattr(builder, name, computed(name))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, cast)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        """A number as the bound of a loop: Triton 3.6 hands numpy an array of one, which numpy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_with_index
