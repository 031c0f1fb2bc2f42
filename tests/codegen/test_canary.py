"""Specs are untrusted: hostile text ends in a diagnostic or a literal; generating touches nothing but its output.

`make fuzz-specs` tries 50 times as many texts.
"""

import ast
import copy
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import SpecErrors
from sageLLM.codegen.facts import Undeclared
from sageLLM.codegen.folders import file_digests, spec_files
from sageLLM.codegen.incremental import Incremental, Rendered
from sageLLM.codegen.source import Document, YamlPath, load_document
from sageLLM.codegen.spec_files import SpecFiles
from sageLLM.codegen.state import FileRecord, State, UnitRecord

CANARIES = [
    '"""; import os; os.system("id"); """',
    "'''\nimport os\n'''",
    "{{ 7 * 7 }}{% for x in y %}",
    "\\N{BULLET} \\x41 \\",
    "line one\nimport os\n# sagellm",
    "\u202eevil\u2028",
    "*/ <!-- --> <script>alert(1)</script>",
    "a\x85b",
    "__import__('os').system('id')",
    "summary: |\n  - nested",
]
NUM_SAMPLES = 24 * int(os.environ.get("SAGELLM_SPEC_SCALE", "1"))
NUM_BATCHES = 2
DOCS = [
    load_document(path, display=f"specs/{path.relative_to(driver.BASE_SPECS).as_posix()}")
    for path in sorted(driver.BASE_SPECS.rglob("*.yaml"))
]


def text_paths(value: Any, path: YamlPath = ()) -> Iterator[YamlPath]:
    """Every place in a document that holds text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from text_paths(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from text_paths(inner, (*path, i))
    elif isinstance(value, str) and path != ("schema",):
        yield path


PLACES = [(doc.file, path) for doc in DOCS for path in text_paths(doc.data)]
PROSE = [place for place in PLACES if place[1][-1] in ("summary", "doc", "source")]


def changed_code(texts: dict[str, str]) -> list[str]:
    """The Python and C++ files that differ from the benign ones in more than text literals and comments."""
    benign, _ = base()
    assert texts.keys() <= benign.keys()
    changed = [name for name, text in texts.items() if text != benign[name]]
    shapes = {".py": shape, ".cpp": without_comments}
    return [n for n in changed if (of := shapes.get(Path(n).suffix)) and of(texts[n]) != of(benign[n])]


def without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


def shape(text: str) -> str:
    """The syntax tree of Python text, all text literals alike."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = "text"
    return ast.dump(tree)


def run(folder: Path, known: State) -> Incremental:
    """Links and renders what the state does not know."""
    files = SpecFiles(file_digests(spec_files([folder])[0]), frozenset(), known.files)
    made = Incremental(files, known, is_intact=lambda _: True)
    made.run()
    return made


def state_after(made: Incremental) -> State:
    """The state that an update leaves, but for what the formatter makes."""
    units = {
        name: UnitRecord(unit.key, tuple(FileRecord(file.path, file.entries, "", "", file.rows) for file in unit.files))
        for name, unit in made.units.items()
    }
    return State(files=dict(made.facts.files), ops=made.op_records, links=made.links, units=units)


def rendered(made: Incremental) -> dict[str, str]:
    files = [file for unit in made.units.values() if isinstance(unit, Rendered) for file in unit.files]
    return {file.path: file.text for file in files}


@cache
def base() -> tuple[dict[str, str], State]:
    """The outputs of the package's specs, and the state that their run leaves."""
    made = run(driver.BASE_SPECS, State())
    return rendered(made), state_after(made)


def emitted(file: str, path: YamlPath, text: str, folder: Path) -> dict[str, str]:
    """The outputs that change if one text of the package's specs is replaced, which `folder` is a copy of."""
    doc = next(doc for doc in DOCS if doc.file == file)
    place = folder / file.removeprefix("specs/")
    place.write_text(_with_text(doc, path, text), encoding="utf-8")
    try:
        return rendered(run(folder, base()[1]))
    finally:
        place.write_text(doc.text, encoding="utf-8")


def _with_text(doc: Document, path: YamlPath, text: str) -> str:
    data = copy.deepcopy(doc.data)
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = text
    return yaml.safe_dump(data, sort_keys=False)


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
def test_hostile_text_never_becomes_code(batch: int, tmp_path: Path) -> None:
    rng = random.Random(batch)
    folder = tmp_path / "specs"
    shutil.copytree(driver.BASE_SPECS, folder)
    accepted = 0
    for i in range(NUM_SAMPLES // NUM_BATCHES):
        file, path = rng.choice(PROSE if i % 2 else PLACES)
        canary = rng.choice(CANARIES)
        try:
            texts = emitted(file, path, canary, folder)
        except (SpecErrors, Undeclared):
            continue
        accepted += 1
        assert not changed_code(texts), f"{canary!r} at {file} {path} changed the code"
    assert accepted, "nothing was accepted, so nothing was shown"


AUDIT = """
import sys, pathlib
out = pathlib.Path(sys.argv[1])
seen = []
def hook(event, args):
    if event == "open" and isinstance(args[0], str) and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append(("write", args[0]))
    elif event.startswith("socket.") or event in ("os.system", "os.exec", "os.fork", "pty.spawn"):
        seen.append((event, repr(args)))
    elif event == "subprocess.Popen":
        seen.append(("run", str(args[0])))
import sageLLM.codegen.driver as driver
sys.addaudithook(hook)
driver.generate(out=out)
for kind, what in seen:
    print(kind, what)
"""


def test_generating_writes_its_output_and_runs_its_formatters_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path),
        "SAGELLM_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run([sys.executable, "-c", AUDIT, str(out)], capture_output=True, text=True, check=True, env=env)
    events = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert {kind for kind, _ in events} == {"write", "run"}
    outside = [what for kind, what in events if kind == "write" and not what.startswith(str(tmp_path))]
    assert [what for what in outside if what != os.devnull] == []
    assert {Path(what).name for kind, what in events if kind == "run"} == {"clang-format", "ruff"}
