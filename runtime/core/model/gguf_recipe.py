"""Declaration of the recipes of GGUF files in generated code: the formats of tensors by name and layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TABLES = ("token_embd", "output")


@dataclass(frozen=True, slots=True)
class Recipe:
    """The format of matrices, and in `tensors` others by the start of the names and by layers.

    Layers are `all`, `first 4`, `first 1/8` of them, or `alternating`: the first and the last eighth, and each third
    layer between. The first entry with the layer is used. `file_type` is `general.file_type` of the file.
    """

    matrices: str
    tensors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    file_type: int | None = None

    @property
    def formats(self) -> set[str]:
        """All formats of matrices."""
        return {self.matrices, *(one for layers in self.tensors.values() for one in layers.values())}

    def format_of(self, stem: str, layer: int, num_layers: int) -> str:
        """The format of a matrix; `stem` is its name without the layer and the last part."""
        for name, formats in self.tensors.items():
            if stem.startswith(name):
                for layers, found in formats.items():
                    if _contains(layers, layer, num_layers):
                        return found
        return self.matrices


def _contains(layers: str, layer: int, num_layers: int) -> bool:
    if layers == "all":
        return True
    if layers == "alternating":
        eighth = num_layers // 8
        return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2
    number = layers.removeprefix("first ")
    share = number.removeprefix("1/")
    return layer < (int(number) if share == number else num_layers // int(share))
