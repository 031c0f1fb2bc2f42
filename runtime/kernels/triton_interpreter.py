"""Makes Triton's interpreter compute bf16 as a GPU does, for checks on machines without a GPU, and makes it faster.

The interpreter stores bf16 as 16 bits in a numpy integer. Up to version 3.9 it passes these integers to numpy's
arithmetic unchanged, and truncates float32 to bf16 instead of rounding. `patch_bf16` widens bf16 operands to float32,
which is exact, lets the interpreter compute, and rounds bf16 results to nearest even.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The bf16 numbers with these bits, which are the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(x: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """The bits of x rounded to bf16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    carry = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return np.where(np.isnan(x), np.uint16(0x7FC0), ((bits + carry) >> 16).astype(np.uint16))


@cache
def patch_interpreter() -> None:
    """Applies both patches, once in a process; TRITON_INTERPRET must be set before Triton is imported."""
    np.seterr(all="ignore")  # kernels compute infinities and NaN in elements that they mask
    patch_bf16()
    patch_language_once()


def patch_language_once() -> None:
    """Keeps the patched functions of triton.language, which each call of a device function would patch again.

    This takes a third off the time of the checks. Functions of a module see the same names, so its first one is enough.
    """
    from triton.runtime import interpreter

    original, patched = interpreter._patch_lang, set[str]()

    def patch_lang(fn: Any) -> Any:
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            original(fn)  # the scope that it returns, which would restore the functions, is dropped
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang


def patch_bf16() -> None:
    """Replaces the arithmetic of the interpreter's builder."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and x.data.dtype == np.uint16 and x.dtype.scalar == tl.bfloat16

    def wide(x: Any) -> Any:
        return handle(widened(x.data), tl.float32) if is_bf16(x) else x

    def narrow(x: Any) -> Any:
        return handle(narrowed(x.data), tl.bfloat16) if x.data.dtype.kind == "f" else x

    def computed(name: str) -> Callable[..., Any]:
        """The operation in float32, with a numeric result rounded if an operand was bf16; comparisons return bits."""
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
        """Makes a scalar an integer loop bound: Triton 3.6 passes an array of one element, which numpy 2.4 rejects."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_with_index
