"""The form of a model's KV cache, by `LLM(kv_cache_dtype=...)`, and the scales for it that checkpoints have.

Checkpoints calibrated for a KV cache of 8 bits have one scale for the keys of a layer and one for its values. The rows
of our forms have scales of their own values, which fit them at least as well, so that these tensors are not read.
"""

from typing import Any, Literal, TypeAlias

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.kv_form import KV_FORMS, KvForm
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.errors import SageError

KvCacheDtype: TypeAlias = Literal["auto", "int8", "fp8"]
KV_CACHE_DTYPES: tuple[str, ...] = ("auto", *KV_FORMS)

_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point")


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of a checkpoint is a scale for a quantised KV cache."""
    return name.rpartition(".")[2] in _SCALES


def choose_kv_form(name: str, layout: ModelLayout, config: Any) -> KvForm | None:
    """The form of codes, or None for the element type. Raises SageError for one that does not exist, or not here."""
    if name not in KV_CACHE_DTYPES:
        raise SageError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {shown(name)}")
    if name == "auto":
        return None
    if not layout.generates:
        raise SageError(f"kv_cache_dtype must be 'auto' for {layout.name}, which computes embeddings, got {name!r}")
    if layout.cache(config).is_shared:
        raise SageError(
            f"kv_cache_dtype must be 'auto' for {layout.name}, got {name!r}: its values are a part of the keys "
            "(latent attention), which have one scale"
        )
    return KV_FORMS[name]
