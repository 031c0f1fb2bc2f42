"""Scaffolds of a new op, model, pass, format, dialect or deployment: spec files that generate at once."""

from pathlib import Path
from typing import TYPE_CHECKING

from sageLLM.codegen.render import Renderer, ident

if TYPE_CHECKING:
    from sageLLM.codegen.load import RawSpecs

_FILES = {
    "op": {"ops": "op"},
    "model": {"models": "model"},
    "pass": {"passes": "pass", "ops": "pass_op"},
    "deploy": {"deploy": "deploy"},
    "dialect": {"dialects": "dialect"},
    "format": {"formats": "format"},
}
"""Folders that get a file, with the template of the file, by kind of entry."""


def scaffold(kind: str, name: str, specs: Path) -> list[Path]:
    """Writes `specs/ops/NAME.yaml` (or models, ..., or passes with the op that they insert) and returns the paths.

    Raises ValueError for a name that is not an identifier, and FileExistsError instead of overwriting a file.
    """
    if ident(name) != name.lower():
        raise ValueError(f"a name must be snake_case, got {name!r}")
    paths = {specs / folder / f"{name}.yaml": template for folder, template in _FILES[kind].items()}
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} already exists; choose another name, or edit it")
    for path, template in paths.items():
        text = Renderer().render(f"scaffold/{template}.yaml.jinja", name=name, schema=_schema_path(specs))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(paths)


def why_taken(kind: str, name: str, raw: "RawSpecs") -> str | None:
    """The reason why the entries of a scaffold cannot have the name."""
    for folder, template in _FILES[kind].items():
        wanted = f"{name}_op" if template == "pass_op" else name
        if wanted in (table := getattr(raw, folder)):
            return f"'{wanted}' is already defined in {table[wanted].key_span()}; choose another name"
    return None


def _schema_path(specs: Path) -> str | None:
    """The path from the new file to the JSON Schemas; None outside the package's own spec folder."""
    return "../../generated/schema" if (specs.parent / "generated" / "schema").is_dir() else None
