"""Stored forms of the KV cache: elements of the model's type, or codes of 8 bits with a scale per token and head.

A row of codes, the key or the value of a token and a head, is a float32 and then one byte per element; a value is
code * scale. Graphs, ops and costs name a cache by its declared type, E[PG, BS, heads, width]; a kernel reads the form
that the cache has (docs/kv-cache.md#codes-of-8-bits).
"""

from dataclasses import dataclass, replace

from sageLLM.runtime.core.model.layout import KvShape

SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KvForm:
    """A form of codes: its name in options, and the element type of its tensors, [PG, BS, heads, 4 + width]."""

    name: str
    dtype: str

    @property
    def native(self) -> str:
        """The name of the form in C++ (`runtime/kernels/cpu/kv_forms.h`)."""
        return f"{self.name}_kv"

    def stored(self, shape: KvShape) -> KvShape:
        """The entry of a token in bytes: the widths with the scale."""
        assert not shape.is_shared, "values must not be a part of the keys, which have one scale"
        (k_heads, k_width), (v_heads, v_width) = shape.k, shape.v
        return replace(shape, k=(k_heads, k_width + SCALE_BYTES), v=(v_heads, v_width + SCALE_BYTES))


KV_FORMS = {form.name: form for form in (KvForm("int8", "int8"), KvForm("fp8", "uint8"))}


def kv_sizes(form: KvForm | None) -> dict[str, int]:
    """The sizes in costs that depend on the form."""
    return {} if form is None else {"kv_size": 1, "kv_scale": SCALE_BYTES}


def kv_bytes(shape: KvShape, form: KvForm | None, element_bytes: int) -> int:
    """The bytes of the entry of a token in one layer."""
    return shape.num_elements * element_bytes if form is None else form.stored(shape).num_elements
