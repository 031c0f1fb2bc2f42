"""Starts a new op, model or pass: a spec file that generates and passes as it is, ready to be edited."""

from pathlib import Path

from sageLLM.codegen.render import Renderer, ident

_FOLDERS = {"op": "ops", "model": "models", "pass": "passes"}


def scaffold(kind: str, name: str, specs: Path) -> Path:
    """Writes `specs/ops/NAME.yaml` (or models, passes) and returns its path.

    Raises ValueError for a name that is not an identifier, FileExistsError rather than overwrite a file.
    """
    if ident(name) != name.lower():
        raise ValueError(f"{name!r} should be snake_case, as names of ops, models and passes are")
    path = specs / _FOLDERS[kind] / f"{name}.yaml"
    if path.exists():
        raise FileExistsError(f"{path} is there already; choose another name, or edit it")
    text = Renderer().render(f"scaffold/{kind}.yaml.jinja", name=name, schema=_schema_path(specs))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _schema_path(specs: Path) -> str | None:
    """Where an editor finds the JSON Schemas from the new file: known for the package's own folder only."""
    return "../../generated/schema" if (specs.parent / "generated" / "schema").is_dir() else None
