"""Memo for linking many overlays on one base in a process.

A result without findings is reused while its inputs are the same: the text of its file, the ops that it uses, and the
vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sageLLM.codegen.diagnostics import Sink
from sageLLM.codegen.facts import reached, words_of
from sageLLM.codegen.folders import file_digest
from sageLLM.codegen.link.interfaces import Interfaces
from sageLLM.codegen.link.models import link_model
from sageLLM.codegen.link.ops import link_op
from sageLLM.codegen.load import Entry, RawSpecs, SpecFile, fused_names, load_file, source_names
from sageLLM.codegen.model.layout import ModelDef
from sageLLM.codegen.model.op import OpDef
from sageLLM.codegen.schema.ops import OpSpec

Key = tuple[Any, ...]


@dataclass(slots=True)
class LinkMemo:
    """Files, ops and models without findings. Keys contain identities of objects that the memo keeps alive."""

    _files: dict[tuple[str, bytes], SpecFile] = field(default_factory=dict)
    _ops: dict[Key, OpDef] = field(default_factory=dict)
    _models: dict[Key, list[tuple[dict[str, OpDef | None], ModelDef]]] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)  # an identity is a key only as long as its object exists

    def __repr__(self) -> str:
        """Without the contents, which have millions of characters; hypothesis prints the arguments of a failed test."""
        return f"LinkMemo({len(self._files)} files, {len(self._ops)} ops, {len(self._models)} models)"

    def load_file(self, path: Path, display: str, sink: Sink) -> SpecFile | None:
        """See `sageLLM.codegen.load.load_file`."""
        key = (display, path.read_bytes())
        file = self._files.get(key) or load_file(path, display, sink)
        if file is not None:
            self._files[key] = file
        return file

    def link_op(self, entry: Entry[OpSpec], raw: RawSpecs, linked: Mapping[str, OpDef], sink: Sink) -> OpDef | None:
        """See `sageLLM.codegen.link.ops.link_op`."""
        fused = [linked[name] for name in sorted(fused_names(entry)) if name in linked]
        templates = [(name, file_digest(path)) for name, (_, path) in raw.templates.items()]
        key = (entry.name, id(entry.doc), tuple(raw.dims), tuple(raw.op_types), *map(id, fused), *templates)
        if key in self._ops:
            return self._ops[key]
        op = link_op(entry, raw, linked, sink)
        if op is not None:
            self._ops[key] = op
            self._alive += [entry.doc, *fused]
        return op

    def link_model(self, name: str, raw: RawSpecs, ops: Interfaces, sink: Sink) -> ModelDef | None:
        """See `sageLLM.codegen.link.models.link_model`."""
        sources = reached(
            [name], lambda one: [found for found in source_names(raw.models[one].spec) if found in raw.models]
        )
        docs = [raw.models[source].doc for source in sources]
        words = sorted({word for one in raw.passes.values() for word in words_of(one.spec.expect)})
        inputs = [(one.name, one.spec) for one in raw.step_inputs.values()]
        key = (name, tuple(map(id, docs)), tuple(raw.dims), tuple(raw.op_types), *inputs, *words)
        for read, model in self._models.setdefault(key, []):
            if all(ops.is_still(name, op) for name, op in read.items()):
                return model
        model_or_none = link_model(name, raw, ops, sink)
        if model_or_none is not None and not ops.is_listed:
            self._models[key].append((ops.looked_up(), model_or_none))
            self._alive += docs
        return model_or_none
