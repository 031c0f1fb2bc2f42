"""Loads spec folders: each YAML file is validated against the schema that it names, and split into entries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from sageLLM.codegen.diagnostics import Sink, Span, SpecErrors, did_you_mean, render
from sageLLM.codegen.facts import VOCABULARY
from sageLLM.codegen.folders import spec_files, template_files
from sageLLM.codegen.schema.base import Strict, validate
from sageLLM.codegen.source import Document, YamlPath, load_document

if TYPE_CHECKING:
    from sageLLM.codegen.schema.deploy import DeployFile
    from sageLLM.codegen.schema.dialects import DialectFile
    from sageLLM.codegen.schema.formats import FormatsFile
    from sageLLM.codegen.schema.hardware import HardwareFile
    from sageLLM.codegen.schema.models import ModelFile
    from sageLLM.codegen.schema.ops import OpSpec
    from sageLLM.codegen.schema.passes import PassSpec
    from sageLLM.codegen.schema.targets import TargetSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One named entry of a spec file, with its location in the text."""

    name: str
    spec: T
    doc: Document
    path: YamlPath

    @property
    def ref(self) -> str:
        """The name of the entry in generated code: `specs/ops/norm.yaml: rms_norm`."""
        return f"{self.doc.file}: {self.name}"

    def span(self, *path: str | int) -> Span:
        return self.doc.span(*self.path, *path)

    def key_span(self, *path: str | int) -> Span:
        return self.doc.key_span(*self.path, *path)

    def text_span(self, path: YamlPath, offset: int, width: int = 1) -> Span:
        return self.doc.text_span((*self.path, *path), offset, width)

    def key_text_span(self, path: YamlPath, offset: int, width: int = 1) -> Span:
        return self.doc.key_text_span((*self.path, *path), offset, width)


@dataclass(frozen=True, slots=True)
class RawSpecs:
    """The entries of all spec files before linking, by kind and name, in the order of files (by name) and lines."""

    ops: "Mapping[str, Entry[OpSpec]]" = field(default_factory=dict)
    models: "Mapping[str, Entry[ModelFile]]" = field(default_factory=dict)
    passes: "Mapping[str, Entry[PassSpec]]" = field(default_factory=dict)
    pass_stages: Mapping[str, Entry[str]] = field(default_factory=dict)
    hardware: "Mapping[str, Entry[HardwareFile]]" = field(default_factory=dict)
    deploy: "Mapping[str, Entry[DeployFile]]" = field(default_factory=dict)
    dialects: "Mapping[str, Entry[DialectFile]]" = field(default_factory=dict)
    formats: "Mapping[str, Entry[FormatsFile]]" = field(default_factory=dict)
    dims: Mapping[str, Entry[str]] = field(default_factory=dict)
    op_types: Mapping[str, Entry[str]] = field(default_factory=dict)
    step_inputs: Mapping[str, Entry[str]] = field(default_factory=dict)
    targets: "Mapping[str, Entry[TargetSpec]]" = field(default_factory=dict)
    base_files: frozenset[str] = frozenset()
    templates: Mapping[str, tuple[str, Path]] = field(default_factory=dict)
    """Kernel templates of overlays, see `folders.template_files`."""

    def is_base(self, entry: Entry[Any]) -> bool:
        """Whether the entry belongs to the package's own specs while an overlay is generated."""
        return entry.doc.file in self.base_files

    def vocabulary(self) -> "RawSpecs":
        """Only the dims, op types, step inputs and targets, which every op and model can refer to."""
        words = {kind: getattr(self, kind) for kind in VOCABULARY}
        return RawSpecs(**words, base_files=self.base_files, templates=self.templates)


@dataclass(frozen=True, slots=True)
class Schema:
    """A kind of spec file: its class in `codegen/schema`, and the kinds of entry that it defines.

    `tables` maps a field of RawSpecs to the field of the file that holds these entries by name, or to None for a file
    that is one entry; the name of that entry is in the field `key`.
    """

    module: str
    class_name: str
    tables: Mapping[str, str | None]
    key: str = ""

    def load(self) -> type[Strict]:
        """The class, imported on first use, because defining all schemas takes longer than reading a file."""
        found: type[Strict] = getattr(import_module(f"sageLLM.codegen.schema.{self.module}"), self.class_name)
        return found


SCHEMAS: dict[str, Schema] = {
    "ops/v1": Schema("ops", "OpsFile", {"ops": "ops"}),
    "models/v1": Schema("models", "ModelFile", {"models": None}, "model"),
    "passes/v1": Schema("passes", "PassesFile", {"passes": "passes", "pass_stages": "stages"}),
    "hardware/v1": Schema("hardware", "HardwareFile", {"hardware": None}, "hardware"),
    "deploy/v1": Schema("deploy", "DeployFile", {"deploy": None}, "deploy"),
    "dialects/v1": Schema("dialects", "DialectFile", {"dialects": None}, "dialect"),
    "formats/v1": Schema("formats", "FormatsFile", {"formats": None}, "method"),
    "dims/v1": Schema("vocabulary", "DimsFile", {"dims": "dims"}),
    "op_types/v1": Schema("vocabulary", "OpTypesFile", {"op_types": "op_types"}),
    "targets/v1": Schema("targets", "TargetsFile", {"targets": "targets"}),
    "inputs/v1": Schema("vocabulary", "InputsFile", {"step_inputs": "step"}),
}


@dataclass(frozen=True, slots=True)
class SpecFile:
    """One file that matches its schema."""

    doc: Document
    spec: Strict


LoadFile = Callable[[Path, str, Sink], SpecFile | None]


def load_specs(folders: Sequence[Path], load: "LoadFile | None" = None) -> RawSpecs:
    """Reads the package's spec folder (the first) and overlays; raises SpecErrors with all findings.

    With one folder no entry is base: code is generated for all of them.
    """
    sink = Sink()
    groups, templates = spec_files(folders), template_files(folders)
    base = frozenset(groups[0]) if len(folders) > 1 else frozenset[str]()
    found = [(load or load_file)(path, name, sink) for group in groups for name, path in group.items()]
    raw = assemble([file for file in found if file is not None], base, sink)
    sink.raise_if_any()
    return replace(raw, templates=templates)


def load_file(path: Path, display: str, sink: Sink) -> SpecFile | None:
    """One spec file, or None after reporting its errors."""
    try:
        doc = load_document(path, display=display)
    except SpecErrors as errors:
        sink.diagnostics += errors.diagnostics
        return None
    return check_file(doc, sink)


def load_only(path: Path, display: str, schema: str) -> Strict:
    """The spec of a file apart from the spec folders, such as `hardware/v1`. Raises ValueError with its diagnostics."""
    sink = Sink()
    spec = _load_only(path, display, schema, sink)
    if spec is None:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        at = dict(enumerate(lines, 1))
        raise ValueError("\n".join(render(one, lambda _, line: at.get(line)) for one in sink.diagnostics))
    return spec


def _load_only(path: Path, display: str, schema: str, sink: Sink) -> Strict | None:
    try:
        doc = load_document(path, display=display)
    except SpecErrors as errors:
        sink.diagnostics += errors.diagnostics
        return None
    found = _schema_of(doc, sink)
    if found is not None and found is not SCHEMAS[schema]:
        # Before its contents: what is wrong with them does not matter.
        examples = f"see specs/{schema.partition('/')[0]} for examples"
        message = f"expected `schema: {schema}`, got {doc.data['schema']}"
        sink.error("SAGE014", message, doc.span("schema"), examples)
        return None
    return validate(found.load(), doc, sink) if found else None


def check_file(doc: Document, sink: Sink) -> SpecFile | None:
    """Validates a document against the schema that it names; None after reporting its errors."""
    schema = _schema_of(doc, sink)
    spec = validate(schema.load(), doc, sink) if schema else None
    return SpecFile(doc, spec) if spec else None


def assemble(files: Sequence[SpecFile], base: frozenset[str], sink: Sink) -> RawSpecs:
    """The entries of all files by kind and name; duplicate names are reported."""
    tables: dict[str, dict[str, Entry[Any]]] = {}
    for file in files:
        for kind, entry in entries_of(file):
            table = tables.setdefault(kind, {})
            if entry.name in table:
                first = ("first defined here", table[entry.name].key_span())
                sink.error("SAGE015", f"'{entry.name}' is defined twice", entry.key_span(), "rename one", (first,))
            table.setdefault(entry.name, entry)
    known: dict[str, Any] = dict(tables)
    return RawSpecs(**known, base_files=base)


def _schema_of(doc: Document, sink: Sink) -> Schema | None:
    if not isinstance(doc.data, dict):
        sink.error("SAGE014", "a spec file must be a mapping", doc.span(), "begin with `schema: ops/v1`")
        return None
    name = doc.data.get("schema")
    if name is None:
        sink.error("SAGE014", "the line `schema:` is missing", doc.span(), did_you_mean("", SCHEMAS))
        return None
    if not isinstance(name, str) or name not in SCHEMAS:
        sink.error("SAGE014", f"unknown schema '{name}'", doc.span("schema"), did_you_mean(str(name), SCHEMAS))
        return None
    return SCHEMAS[name]


def entries_of(file: SpecFile) -> list[tuple[str, Entry[Any]]]:
    """The entries of a file in order, each with its kind: a field of RawSpecs."""
    schema = SCHEMAS[file.doc.data["schema"]]
    found: list[tuple[str, Entry[Any]]] = []
    for kind, key in schema.tables.items():
        if key is None:
            found.append((kind, Entry(getattr(file.spec, schema.key), file.spec, file.doc, ())))
        else:
            items = getattr(file.spec, key).items()
            found += [(kind, Entry(name, value, file.doc, (key, name))) for name, value in items]
    return found


def source_names(spec: "ModelFile") -> list[str]:
    """The layouts that a layout extends, and those it uses blocks of."""
    used = [block.use.partition(".")[0] for block in spec.blocks.values() if block.use is not None]
    return list(dict.fromkeys([*([spec.extends] if spec.extends is not None else []), *used]))


def fused_names(entry: "Entry[OpSpec]") -> set[str]:
    """The ops called in `fuses`. A line that does not parse calls none; it is refused when it is linked."""
    names = {line.partition("=")[2].partition("(")[0].strip() for line in entry.spec.fuses or []}
    return names - {entry.name}
