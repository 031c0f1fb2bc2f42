"""KV caches of codes as tensors: their form, and the shape that graphs declare for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.model.kv_form import KV_FORMS, SCALE_BYTES, KvForm

TORCH_TYPES = {form: getattr(torch, form.dtype) for form in KV_FORMS.values()}
FLOATS = ("f16", "bf16", "f32", "f64")
_FORMS = {dtype: form for form, dtype in TORCH_TYPES.items()}


def form_of(cache: Tensor) -> KvForm | None:
    """The form of a cache by its element type; None for elements of the model's type."""
    return _FORMS.get(cache.dtype)


def cache_form(ref: TensorRef, held: Tensor) -> KvForm | None:
    """The form of a bound tensor that a graph declares as `ref`, if it is a cache of codes: the types then differ."""
    return form_of(held) if ref.dtype in FLOATS else None


def declared_shape(cache: Tensor) -> Sequence[int]:
    """The shape of a cache in graphs, without the scales."""
    return cache.shape if form_of(cache) is None else (*cache.shape[:-1], cache.shape[-1] - SCALE_BYTES)
