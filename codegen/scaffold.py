"""Starts a new op, model or pass: a spec file that generates and passes as it is, ready to be edited."""

from pathlib import Path

from sageLLM.codegen.render import Renderer, ident

_FILES = {
    "op": {"ops": "op"},
    "model": {"models": "model"},
    "pass": {"passes": "pass", "ops": "pass_op"},
}
"""For each kind the folders that get a file, and the template of the file."""


def scaffold(kind: str, name: str, specs: Path) -> list[Path]:
    """Writes `specs/ops/NAME.yaml` (or models, or passes with the op that the pass puts in) and returns the paths.

    Raises ValueError for a name that is not an identifier, FileExistsError rather than overwrite a file.
    """
    if ident(name) != name.lower():
        raise ValueError(f"{name!r} should be snake_case, as names of ops, models and passes are")
    paths = {specs / folder / f"{name}.yaml": template for folder, template in _FILES[kind].items()}
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there already; choose another name, or edit it")
    for path, template in paths.items():
        text = Renderer().render(f"scaffold/{template}.yaml.jinja", name=name, schema=_schema_path(specs))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(paths)


def _schema_path(specs: Path) -> str | None:
    """Where an editor finds the JSON Schemas from the new file: known for the package's own folder only."""
    return "../../generated/schema" if (specs.parent / "generated" / "schema").is_dir() else None
