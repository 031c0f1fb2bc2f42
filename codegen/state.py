"""State of incremental updates, in `.cache` of the generated tree: digests of everything that files are made from.

It only allows a run to skip work, where its digests match the specs, the generator and the tree. If it is missing or
damaged, everything is generated again. `generate --check` never reads it, and git ignores it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sageLLM.codegen.contents import Row
from sageLLM.codegen.facts import FileFacts

FOLDER = ".cache"
FILE = "generate.json"
SOURCES = "sources.json"
CPP_STYLE = Path(__file__).resolve().parent.parent / "templates" / "cpu" / ".clang-format"
TOOLS = ("clang-format", "jinja2", "markupsafe", "pydantic", "pydantic-core", "pyyaml", "ruff")
"""Packages that generated text depends on."""

Reads = Mapping[str, str | None]
"""Ops looked up by name, with a digest of the interface, or None for an unknown name."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One generated file: its entries, digests of its text before and after formatting, and its rows for tables."""

    path: str
    entries: tuple[str, ...]
    inputs: str
    output: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """Files that are generated together, and a digest of everything that they are made from."""

    key: str
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """A model, or all passes, linked without findings: a digest of the entries, and the ops that were read.

    `states` are the calls of ops for which states on a rank were derived, see `link.interfaces.Interfaces`.
    """

    key: str
    reads: Reads
    states: tuple[Any, ...] = ()


@dataclass(slots=True)
class State:
    """The records of a tree."""

    generator: str = ""
    formatter: str = ""
    base: tuple[str, ...] = ()
    files: dict[str, FileFacts] = field(default_factory=dict)
    ops: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Digests of the meaning and of the interface of each op."""
    links: dict[str, LinkRecord] = field(default_factory=dict)
    units: dict[str, UnitRecord] = field(default_factory=dict)
    manifest: str = ""

    @property
    def outputs(self) -> dict[str, FileRecord]:
        return {file.path: file for unit in self.units.values() for file in unit.files}


def load_state(out: Path) -> State:
    """The state of the tree at `out`; empty if it is missing or damaged."""
    try:
        return _from_json(json.loads((out / FOLDER / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return State()


def save_state(state: State, out: Path) -> None:
    """Stores the state in the tree. A failure is ignored: the next run then starts from scratch."""
    folder = out / FOLDER
    try:
        ignore_in_git(folder)
        draft = folder / f"{FILE}.{os.getpid()}"
        draft.write_text(json.dumps(_to_json(state), separators=(",", ":")), encoding="utf-8")
        draft.replace(folder / FILE)
        for stale in folder.glob(f"{FILE}.*"):  # drafts of runs that were killed
            stale.unlink(missing_ok=True)
    except OSError:
        return


def other_sources(overlays: Sequence[Path], out: Path) -> str | None:
    """The overlays that the tree was last generated from, if they still exist and none of them is among `overlays`.

    Folders of the same name cannot be told apart by the manifest, which contains no absolute paths.
    """
    try:
        data = json.loads((out / FOLDER / SOURCES).read_text(encoding="utf-8"))
        is_here, folders = data["out"] == str(out.resolve()), [Path(folder) for folder in data["specs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    current = {folder.resolve() for folder in overlays}
    others = [folder for folder in folders if any(folder.rglob("*.yaml"))]
    return ", ".join(map(str, others)) if is_here and others and current.isdisjoint(folders) else None


def save_sources(overlays: Sequence[Path], out: Path) -> None:
    """Stores the overlays of the tree for `other_sources`. A failure is ignored, as for the state."""
    text = json.dumps({"out": str(out.resolve()), "specs": [str(folder.resolve()) for folder in overlays]})
    path = out / FOLDER / SOURCES
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            ignore_in_git(out / FOLDER)
            path.write_text(text, encoding="utf-8")
    except OSError:
        return


def ignore_in_git(folder: Path) -> None:
    """Creates a folder that git ignores."""
    folder.mkdir(exist_ok=True)
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")


def _to_json(state: State) -> dict[str, Any]:
    return {
        "generator": state.generator,
        "formatter": state.formatter,
        "base": state.base,
        "files": {name: facts.to_json() for name, facts in state.files.items()},
        "ops": state.ops,
        "links": {name: [link.key, link.reads, link.states] for name, link in state.links.items()},
        "units": {
            name: [unit.key, [[f.path, f.entries, f.inputs, f.output, f.rows] for f in unit.files]]
            for name, unit in state.units.items()
        },
        "manifest": state.manifest,
    }


def _from_json(data: dict[str, Any]) -> State:
    return State(
        generator=data["generator"],
        formatter=data["formatter"],
        base=tuple(data["base"]),
        files={name: FileFacts.from_json(name, facts) for name, facts in data["files"].items()},
        ops={name: (meaning, interface) for name, (meaning, interface) in data["ops"].items()},
        links={name: LinkRecord(key, reads, tuple(states)) for name, (key, reads, states) in data["links"].items()},
        units={
            name: UnitRecord(
                key, tuple(FileRecord(path, tuple(e), raw, done, tuple(rows)) for path, e, raw, done, rows in files)
            )
            for name, (key, files) in data["units"].items()
        },
        manifest=data["manifest"],
    )


def generator_key(package: Path) -> str:
    """A digest of the generator: sources, templates, and versions of the tools."""
    seen = hashlib.sha256(repr((sys.version_info, [_version(name) for name in TOOLS])).encode())
    for folder, pattern in (("codegen", "*.py"), ("templates", "*.jinja")):
        for path in sorted((package / folder).rglob(pattern)):
            text = path.read_bytes()
            seen.update(f"{path.relative_to(package).as_posix()} {len(text)}\n".encode() + text)
    return seen.hexdigest()[:32]


def formatter_key() -> str:
    """The formatters: their results are kept as long as this key and the unformatted text are the same."""
    return f"{_version('ruff')} {_version('clang-format')} {CPP_STYLE.read_text(encoding='utf-8')}"


def _version(name: str) -> str:
    """The installed version, from the name of its metadata folder: importlib takes ten times longer."""
    places = [Path(place) for place in sys.path if place.endswith("-packages")]
    found = [path.name for place in places for path in place.glob(f"{name.replace('-', '_')}-*.dist-info")]
    return found[0] if len(found) == 1 else _version_by_import(name)


def _version_by_import(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def cache_folder() -> Path:
    """SAGELLM_CACHE_DIR, else `sagellm` in XDG_CACHE_HOME or ~/.cache. Raises RuntimeError without a home folder."""
    if chosen := os.environ.get("SAGELLM_CACHE_DIR"):
        return Path(chosen)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "sagellm"
