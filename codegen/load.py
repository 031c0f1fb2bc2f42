"""Loads spec folders: every YAML file by its `schema:` line, validated, each entry with its place."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from sageLLM.codegen.diagnostics import Sink, Span, SpecErrors, did_you_mean
from sageLLM.codegen.schema.base import Strict, validate
from sageLLM.codegen.schema.hardware import HardwareFile
from sageLLM.codegen.schema.models import ModelFile
from sageLLM.codegen.schema.ops import OpsFile, OpSpec
from sageLLM.codegen.schema.passes import PassesFile, PassSpec
from sageLLM.codegen.schema.vocabulary import DimsFile, InputsFile, OpTypesFile
from sageLLM.codegen.source import Document, YamlPath, load_document

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One named thing of a spec file, with the way back to its text."""

    name: str
    spec: T
    doc: Document
    path: YamlPath

    @property
    def ref(self) -> str:
        """How generated code names its origin: `specs/ops/norm.yaml: rms_norm`."""
        return f"{self.doc.file}: {self.name}"

    def span(self, *path: str | int) -> Span:
        return self.doc.span(*self.path, *path)

    def key_span(self, *path: str | int) -> Span:
        return self.doc.key_span(*self.path, *path)

    def text_span(self, path: YamlPath, offset: int, width: int = 1) -> Span:
        return self.doc.text_span((*self.path, *path), offset, width)

    def key_text_span(self, path: YamlPath, offset: int, width: int = 1) -> Span:
        return self.doc.key_text_span((*self.path, *path), offset, width)


@dataclass(slots=True)
class RawSpecs:
    """What the folders say, before linking. Entries keep the order of files (by name) and of lines."""

    ops: dict[str, Entry[OpSpec]] = field(default_factory=dict)
    models: dict[str, Entry[ModelFile]] = field(default_factory=dict)
    passes: dict[str, Entry[PassSpec]] = field(default_factory=dict)
    pass_stages: dict[str, Entry[str]] = field(default_factory=dict)
    hardware: dict[str, Entry[HardwareFile]] = field(default_factory=dict)
    dims: dict[str, Entry[str]] = field(default_factory=dict)
    op_types: dict[str, Entry[str]] = field(default_factory=dict)
    step_inputs: dict[str, Entry[str]] = field(default_factory=dict)
    base_files: frozenset[str] = frozenset()
    documents: dict[str, Document] = field(default_factory=dict)

    def is_base(self, entry: Entry[Any]) -> bool:
        """Whether the entry belongs to the package's own specs, whose code is generated there."""
        return entry.doc.file in self.base_files


SCHEMAS: dict[str, type[Strict]] = {
    "ops/v1": OpsFile,
    "models/v1": ModelFile,
    "passes/v1": PassesFile,
    "hardware/v1": HardwareFile,
    "dims/v1": DimsFile,
    "op_types/v1": OpTypesFile,
    "inputs/v1": InputsFile,
}


@dataclass(frozen=True, slots=True)
class SpecFile:
    """One file that was read and fits its schema."""

    doc: Document
    spec: Strict


def load_specs(folders: Sequence[Path]) -> RawSpecs:
    """Reads the package's spec folder (the first) and overlays; raises SpecErrors with all findings.

    With one folder nothing is base: its own code is what gets generated.
    """
    sink = Sink()
    files = [_read_folder(folder, sink) for folder in folders]
    base = frozenset(file.doc.file for file in files[0]) if len(folders) > 1 else frozenset[str]()
    raw = assemble([file for group in files for file in group], base, sink)
    sink.raise_if_any()
    return raw


def _read_folder(folder: Path, sink: Sink) -> list[SpecFile]:
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        sink.error("SAGE502", f"the spec folder '{folder.name}' holds no .yaml file", None, "check --specs")
    files = []
    for path in paths:
        display = f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"
        try:
            doc = load_document(path, display=display)
        except SpecErrors as errors:
            sink.diagnostics += errors.diagnostics
            continue
        if file := check_file(doc, sink):
            files.append(file)
    return files


def check_file(doc: Document, sink: Sink) -> SpecFile | None:
    """The document against the schema that its first line names; None after reporting what does not fit."""
    schema = _schema_of(doc, sink)
    spec = validate(schema, doc, sink) if schema else None
    return SpecFile(doc, spec) if spec else None


def assemble(files: Sequence[SpecFile], base: frozenset[str], sink: Sink) -> RawSpecs:
    """The entries of all files, by kind and name; a name that is used twice is reported."""
    raw = RawSpecs(base_files=base)
    for file in files:
        raw.documents[file.doc.file] = file.doc
        _add_entries(file.spec, file.doc, raw, sink)
    return raw


def _schema_of(doc: Document, sink: Sink) -> type[Strict] | None:
    if not isinstance(doc.data, dict):
        sink.error("SAGE014", "a spec file is a mapping", doc.span(), "begin with `schema: ops/v1`")
        return None
    name = doc.data.get("schema")
    if name is None:
        sink.error("SAGE014", "the line `schema:` is missing", doc.span(), did_you_mean("", SCHEMAS))
        return None
    if not isinstance(name, str) or name not in SCHEMAS:
        sink.error("SAGE014", f"unknown schema '{name}'", doc.span("schema"), did_you_mean(str(name), SCHEMAS))
        return None
    return SCHEMAS[name]


def _add_entries(spec: Strict, doc: Document, raw: RawSpecs, sink: Sink) -> None:
    def add(table: dict[str, Entry[T]], items: Iterable[tuple[str, T]], locate: Callable[[str], YamlPath]) -> None:
        for name, value in items:
            entry = Entry(name, value, doc, locate(name))
            if name in table:
                first = ("first defined here", table[name].key_span())
                sink.error("SAGE015", f"'{name}' is defined twice", entry.key_span(), "rename one", (first,))
                continue
            table[name] = entry

    match spec:
        case OpsFile():
            add(raw.ops, spec.ops.items(), lambda name: ("ops", name))
        case ModelFile():
            add(raw.models, [(spec.model, spec)], lambda _: ())
        case PassesFile():
            add(raw.passes, spec.passes.items(), lambda name: ("passes", name))
            add(raw.pass_stages, spec.stages.items(), lambda name: ("stages", name))
        case HardwareFile():
            add(raw.hardware, [(spec.hardware, spec)], lambda _: ())
        case DimsFile():
            add(raw.dims, spec.dims.items(), lambda name: ("dims", name))
        case OpTypesFile():
            add(raw.op_types, spec.op_types.items(), lambda name: ("op_types", name))
        case InputsFile():
            add(raw.step_inputs, spec.step.items(), lambda name: ("step", name))
