"""All specs after linking: what the emitters read."""

from collections.abc import Mapping
from dataclasses import dataclass

from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.model.layout import ModelDef
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.model.rule import PassDef
from sageLLM.codegen.schema.hardware import HardwareFile


@dataclass(frozen=True, slots=True)
class Specs:
    """Every op, model, pass and device by name, in spec order; `raw` leads back to the text."""

    raw: RawSpecs
    ops: Mapping[str, OpDef]
    models: Mapping[str, ModelDef]
    passes: Mapping[str, PassDef]
    hardware: Mapping[str, Entry[HardwareFile]]

    @property
    def is_overlay(self) -> bool:
        """Whether the package's own specs are only the base, and an overlay's code is generated."""
        return bool(self.raw.base_files)
