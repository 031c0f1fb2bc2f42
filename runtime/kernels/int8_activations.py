"""Weights for the torch references that round the activations of their products to 8 bits, as the C++ kernels do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.kernels.cpu.packing import DEPTH

ACTIVATION_FORMS = ("int8",)
"""The types of codes that activations can be rounded to."""
INT8_ACTIVATIONS = "int8_activations"
"""The op that defines the rounding (specs/ops/quantization.yaml)."""
GROUP = DEPTH
"""The inputs of a scale: a block of `int8_rows.h` is a step of the packed weight. K is padded with zeros."""


def with_int8_activations(weight: Tensor, kernel: Kernel) -> Tensor:
    """The weight as one of which products round their activations by the kernel of INT8_ACTIVATIONS."""
    found = weight.as_subclass(Int8Weight)
    found.kernel = kernel
    return found


def rounded(x: Tensor, kernel: Kernel) -> Tensor:
    """The activations [..., K] that the codes of `x` stand for, in float32, or in float64 if x is."""
    inner = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -inner % GROUP))
    codes, scale = kernel(padded.reshape(*x.shape[:-1], -1, GROUP))
    values: Tensor = codes.to(scale.dtype) * scale[..., None]
    return values.flatten(-2)[..., :inner]


class Int8Weight(Tensor):
    """A weight [..., N, K]; products with it take rounded activations, and are computed in float32.

    Other functions take its values. A part of it by number, as of an expert, and a copy in another type round, too.
    """

    kernel: Kernel

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        weight = next((one for one in args if isinstance(one, cls)), None)
        kernel = None if weight is None else weight.__dict__.get("kernel")
        plain = [one.as_subclass(Tensor) if isinstance(one, cls) else one for one in args]
        if kernel is None:
            return function(*plain, **(kwargs or {}))
        if function is torch.nn.functional.linear:
            return _linear(*plain, kernel=kernel, **(kwargs or {}))
        if function is torch.einsum:  # of activations, which come first, in the type of the sums
            subscripts, x, values = plain
            return torch.einsum(subscripts, rounded(x, kernel).to(x.dtype), values)
        found = function(*plain, **(kwargs or {}))
        is_part = function is Tensor.__getitem__ and not isinstance(args[1], Tensor)
        return with_int8_activations(found, kernel) if is_part or function is Tensor.to else found


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernel: Kernel) -> Tensor:
    values = rounded(x, kernel)
    wide_bias = None if bias is None else bias.to(values.dtype)
    return torch.nn.functional.linear(values, weight.to(values.dtype), wide_bias).to(x.dtype)
