"""All linked specs, the input of the emitters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sageLLM.codegen.contents import Contents, EntryName, LayoutName
from sageLLM.codegen.load import Entry, RawSpecs
from sageLLM.codegen.render import Output

if TYPE_CHECKING:  # a run that reaches no model need not import what models are made of
    from sageLLM.codegen.model.dialect import DialectDef
    from sageLLM.codegen.model.format import MethodDef
    from sageLLM.codegen.model.layout import ModelDef
    from sageLLM.codegen.model.op import OpDef
    from sageLLM.codegen.model.rule import PassDef
    from sageLLM.codegen.schema.hardware import HardwareFile


@dataclass(frozen=True, slots=True)
class Specs:
    """Every op, model, pass, device, dialect and quantisation method in spec order; `raw` refers back to the text."""

    raw: RawSpecs
    ops: "Mapping[str, OpDef]"
    models: "Mapping[str, ModelDef]"
    passes: "Mapping[str, PassDef]"
    hardware: "Mapping[str, Entry[HardwareFile]]"
    dialects: "Mapping[str, DialectDef]"
    methods: "Mapping[str, MethodDef]"

    @property
    def is_overlay(self) -> bool:
        """Whether code is generated for an overlay, with the package's own specs as its base."""
        return bool(self.raw.base_files)

    def own(self) -> "OwnSpecs":
        """The entries that code is generated from: all but the base's."""
        return OwnSpecs(
            self.is_overlay,
            [op for op in self.ops.values() if not self.raw.is_base(op.entry)],
            [model for model in self.models.values() if not self.raw.is_base(model.entry)],
            [entry for entry in self.hardware.values() if not self.raw.is_base(entry)],
            [method for method in self.methods.values() if not self.raw.is_base(method.entry)],
        )


@dataclass(frozen=True, slots=True)
class OwnSpecs:
    """The ops, models, devices and quantisation methods that code is generated from, in spec order."""

    is_overlay: bool
    ops: "list[OpDef]"
    models: "list[ModelDef]"
    devices: "list[Entry[HardwareFile]]"
    methods: "list[MethodDef]"

    @property
    def ops_by_stem(self) -> "dict[str, list[OpDef]]":
        """The ops by the spec file that they come from; its stem names the generated files."""
        found: dict[str, list[OpDef]] = {}
        for op in self.ops:
            found.setdefault(op.stem, []).append(op)
        return found

    def contents(self, outputs: Iterable[Output]) -> Contents:
        """The contents of the tables, with the rows of `outputs`."""
        return Contents(
            self.is_overlay,
            tuple(_name_of(op.entry) for op in self.ops),
            tuple(
                LayoutName(model.name, model.entry.doc.file, model.checkpoints.architectures) for model in self.models
            ),
            tuple(_name_of(entry) for entry in self.devices),
            tuple(_name_of(method.entry) for method in self.methods),
            {output.path: output.rows for output in outputs if output.rows},
        )


def _name_of(entry: Entry[Any]) -> EntryName:
    return EntryName(entry.name, entry.doc.file)
