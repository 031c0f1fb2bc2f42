"""Command `sagellm generate --diff`: the effect of a spec change on generated files and on every model's graphs."""

import dataclasses
import filecmp
import json
import sys
from pathlib import Path

from sageLLM.runtime.inspect.summary import diff_lines, summarise
from sageLLM.runtime.registry.plugins import load_tree


def show_spec_diff(old: Path, new: Path, as_json: bool) -> int:
    """Prints the changes of the current specs to the generated tree, and to the graphs of every model."""
    if not (old / "__init__.py").is_file():
        print(f"error: expected a generated folder to compare with, got {old}", file=sys.stderr)
        return 1
    before, after = (summarise(load_tree(tree)) for tree in (old, new))
    lines = diff_lines(before, after)
    files = _changed_files(old, new)
    if as_json:
        data = {name: {s: dataclasses.asdict(one) for s, one in stages.items()} for name, stages in after.items()}
        print(json.dumps({"files": files, "changes": lines, "after": data}))
        return 0
    for file in files:
        print(file)
    print("\n".join(lines) or "no graph changes")
    return 0


def _changed_files(old: Path, new: Path) -> list[str]:
    names = {
        path.relative_to(tree).as_posix()
        for tree in (old, new)
        for path in tree.rglob("*")
        if path.is_file() and not {"__pycache__", ".cache", "MANIFEST.json"}.intersection(path.parts)
    }
    marks = {(True, False): "removed", (False, True): "new"}
    lines = []
    for name in sorted(names):
        exists = ((old / name).is_file(), (new / name).is_file())
        if exists != (True, True):
            lines.append(f"{marks[exists]}: {name}")
        elif not filecmp.cmp(old / name, new / name, shallow=False):
            lines.append(f"changed: {name}")
    return lines
