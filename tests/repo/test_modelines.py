"""Tests that every spec file begins with the modeline that points editors to its JSON Schema."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted([*ROOT.glob("specs/**/*.yaml"), *ROOT.glob("examples/*/specs/**/*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_first_line_names_the_schema_of_the_files_kind(path: Path) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    kind = next(line for line in rest if line.startswith("schema: ")).removeprefix("schema: ").removesuffix("/v1")
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    schema = (path.parent / first.removeprefix(prefix)).resolve()
    assert schema == ROOT / "generated" / "schema" / f"{kind}.schema.json"
    assert schema.is_file()
