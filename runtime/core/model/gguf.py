"""Declaration of the architectures of GGUF files in generated code: their configs and tensor names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Constant = str | int | float | bool | None
RopeKey = Literal["rope_parameters", "rope_scaling"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture: names of its config and tensors in Hugging Face checkpoints, and in files.

    `hf` is the class in config.json, and `model_type` its type, empty if that is the architecture's name. `keys` maps
    keys of config.json to those of the metadata, after the name of the architecture: one key, or a product
    `a * b / c`; None removes a key of the defaults, and those of `optional` may be absent. `copies` are keys of the
    metadata that written files have with the value of another. `constants` are more keys of config.json, and `present`
    those that are true if the file has a tensor. `names` maps the names of tensors in files to those in checkpoints,
    without the layer and the last part; `experts` those of stacks, with `{e}` for the expert.

    With `is_permuted` the rows of q and k are in the order of rotation of adjacent components; with `adds_one` the
    weights of norms have 1 added. `rows` are vectors that checkpoints have as matrices of one row. `refused` are values
    of metadata with which the file does not determine the model.
    """

    hf: str = ""
    model_type: str = ""
    keys: Mapping[str, str | None] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str | None] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[str, ...] = ()
    is_permuted: bool = False
    adds_one: bool = False
    rope: RopeKey = "rope_parameters"
    refused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def with_defaults(self, defaults: Architecture) -> Architecture:
        """With the names and keys of the defaults that it does not have."""
        return replace(
            self,
            keys={**defaults.keys, **self.keys},
            optional=(*defaults.optional, *self.optional),
            copies={**defaults.copies, **self.copies},
            names={**defaults.names, **self.names},
            experts={**defaults.experts, **self.experts},
        )


def factors_of(product: str) -> Iterator[tuple[str, int]]:
    """The factors of `a * b / c` with their powers: ("a", 1), ("b", 1), ("c", -1)."""
    for i, part in enumerate(product.split("/")):
        for factor in part.split("*"):
            yield factor.strip(), -1 if i else 1
