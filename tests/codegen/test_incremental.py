"""Incremental generation against generation from scratch: the same files or findings, whatever was edited before.

`make fuzz-specs` plays more and longer sequences of random edits than the suite does.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from few_models import keep_models

from sageLLM.codegen import driver, update
from sageLLM.codegen.diagnostics import SpecErrors
from sageLLM.codegen.expectations import Missed
from sageLLM.codegen.facts import Undeclared
from sageLLM.codegen.incremental import Incremental, Rendered
from sageLLM.codegen.state import FILE, FOLDER, State, load_state
from sageLLM.codegen.swap import MANIFEST
from sageLLM.codegen.update import update as generate

SEEDS = range(*map(int, os.environ.get("SAGELLM_EDIT_SEEDS", "0:1").split(":")))
NUM_ROUNDS = int(os.environ.get("SAGELLM_EDIT_ROUNDS", "1"))
"""Comparisons of a sequence; up to three edits come before each."""


class Workspace:
    """A copy of the package's specs, and the tree that is generated from it."""

    def __init__(self, folder: Path) -> None:
        self.specs, self.out = folder / "specs", folder / "generated"
        shutil.copytree(driver.BASE_SPECS, self.specs)
        keep_models(self.specs)

    def generate(self) -> None:
        generate([self.specs], self.out, driver.BASE_OUT)

    def drift(self) -> list[str]:
        return driver.check(out=self.out, base=self.specs)

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.specs / file
        text = path.read_text(encoding="utf-8")
        assert old in text, "the specs have changed; edit something else"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def tree(self) -> dict[str, bytes]:
        """The files of the tree, without its state."""
        files = [path for path in self.out.rglob("*") if path.is_file() and path.parent.name != FOLDER]
        return {path.relative_to(self.out).as_posix(): path.read_bytes() for path in files}

    def files(self, pattern: str = "**/*.yaml") -> list[Path]:
        return sorted(self.specs.glob(pattern))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tree that is up to date; tests work on copies of it."""
    workspace = Workspace(tmp_path_factory.mktemp("generated"))
    workspace.generate()
    return workspace


@pytest.fixture
def workspace(generated: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(generated.out, tmp_path / "generated")
    return Workspace(tmp_path)


EDITED = ("ops/norm.yaml", "rsqrt(ms + eps)", "rsqrt(eps + ms)")


@pytest.fixture(scope="module")
def edited(generated: Workspace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tree after an edit, from scratch."""
    workspace = Workspace(tmp_path_factory.mktemp("edited"))
    workspace.edit(*EDITED)
    driver.generate_from_scratch(out=workspace.out, base=workspace.specs)
    return workspace.tree()


# random edits

Edit = Callable[[Workspace, random.Random], None]

TEXTS = [
    (r" \* ", " + "),
    (r" \+ ", " - "),
    (r"\brsqrt\(", "sqrt("),
    (r"\b1\.0\b", "2.0"),
    (r"\b0\.5\b", "0.25"),
    (r"summary: (.)", r"summary: Once more, \1"),
    (r", optional: true", ""),
    (r"benefit: 1", "benefit: 2"),
    (r"\[\.\.\., H\]", "[T, H]"),
    (r"default: ", "min: 0, default: "),
    (r"\b2\*L\b", "L + L"),
    (r"gelu_new", "gelu"),
    (r"true", "false"),
    (r"(\d+)e9", r"1\1e9"),
    (r"hidden_size", "d_model"),
    (r"eps=eps", "eps=0.001"),
    (r"tp: \{shard: 0", "tp: {shard: 1"),
]


def change_text(workspace: Workspace, rng: random.Random) -> None:
    """One occurrence of a pattern in a random file."""
    pattern, new = rng.choice(TEXTS)
    files = [path for path in workspace.files() if re.search(pattern, path.read_text(encoding="utf-8"))]
    path = rng.choice(files or workspace.files())
    text = path.read_text(encoding="utf-8")
    if found := list(re.finditer(pattern, text)):
        place = rng.choice(found)
        path.write_text(text[: place.start()] + place.expand(new) + text[place.end() :], encoding="utf-8")


def entries_of(text: str) -> list[str]:
    """The parts of an ops or passes file that begin with an indented name; the first part is the head."""
    return re.split(r"^(?=  \w+:\n)", text, flags=re.MULTILINE)


def remove_entry(workspace: Workspace, rng: random.Random) -> None:
    path = rng.choice(workspace.files("ops/*.yaml") + workspace.files("passes/*.yaml"))
    head, *entries = entries_of(path.read_text(encoding="utf-8"))
    if entries:
        entries.pop(rng.randrange(len(entries)))
    path.write_text("".join([head, *entries]), encoding="utf-8")


def copy_entry(workspace: Workspace, rng: random.Random) -> None:
    path = rng.choice(workspace.files("ops/*.yaml"))
    head, *entries = entries_of(path.read_text(encoding="utf-8"))
    if not entries:
        return
    copied = re.sub(r"^  (\w+):", r"  \1_again:", rng.choice(entries))
    copied = re.sub(r"^    rule: .*\n", "", copied, flags=re.MULTILINE)
    path.write_text("".join([head, *entries, copied]), encoding="utf-8")


def swap_entries(workspace: Workspace, rng: random.Random) -> None:
    path = rng.choice(workspace.files("ops/*.yaml"))
    head, *entries = entries_of(path.read_text(encoding="utf-8"))
    rng.shuffle(entries)
    path.write_text("".join([head, *(entry if entry.endswith("\n") else entry + "\n" for entry in entries)]))


def rename_op(workspace: Workspace, rng: random.Random) -> None:
    """Everywhere, so that the specs stay sound."""
    path = rng.choice(workspace.files("ops/*.yaml"))
    names = re.findall(r"^  (\w+):$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    name = rng.choice(names or ["rms_norm"])
    for other in workspace.files():
        text = other.read_text(encoding="utf-8")
        other.write_text(re.sub(rf"\b{name}\b", f"{name}_x", text), encoding="utf-8")


def rename_file(workspace: Workspace, rng: random.Random) -> None:
    path = rng.choice(workspace.files())
    path.rename(path.with_name(f"x_{path.name}"))


def remove_file(workspace: Workspace, rng: random.Random) -> None:
    rng.choice(workspace.files("models/*.yaml") + workspace.files("hardware/*.yaml")).unlink()


def add_file(workspace: Workspace, rng: random.Random) -> None:
    from sageLLM.codegen.scaffold import scaffold

    name = f"fresh_{rng.randrange(1000)}"
    if not list(workspace.specs.rglob(f"{name}.yaml")):
        scaffold(rng.choice(["op", "model", "pass"]), name, workspace.specs)


def tamper(workspace: Workspace, rng: random.Random) -> None:
    """Generated files that were edited or removed."""
    path = rng.choice(
        [path for path in sorted(workspace.out.rglob("*.*")) if path.is_file() and FOLDER not in str(path)]
    )
    if rng.random() < 0.5:
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    else:
        path.unlink()


EDITS: list[Edit] = [change_text] * 6 + [
    remove_entry, copy_entry, swap_entries, rename_op, rename_file, remove_file, add_file, tamper,
]  # fmt: skip


def outcome(run: Callable[[], object]) -> str:
    """The findings, or nothing."""
    try:
        run()
    except SpecErrors as errors:
        return str(errors)
    return ""


@pytest.mark.parametrize("seed", SEEDS)
def test_random_edits(workspace: Workspace, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    history = []
    for number in range(NUM_ROUNDS):
        shutil.copytree(workspace.specs, tmp_path / f"before_{number}")
        for _ in range(rng.randint(1, 3)):
            edit = rng.choice(EDITS)
            history.append(edit.__name__)
            edit(workspace, rng)
            try:
                workspace.generate()
                findings = ""
            except (SpecErrors, Undeclared) as error:
                findings = str(error)
        expected = outcome(workspace.drift)
        assert bool(findings) == bool(expected), (history, findings, expected)
        if expected:
            assert outcome(lambda: driver.generate(out=workspace.out, base=workspace.specs)) == expected, history
            shutil.rmtree(workspace.specs)
            shutil.copytree(tmp_path / f"before_{number}", workspace.specs)
            workspace.generate()
        assert workspace.drift() == [], history


# single edits: what they reach


def reached(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    """Generates; the units that were rendered, and the ops that were linked."""
    runs: list[Incremental] = []
    run = Incremental.run
    with monkeypatch.context() as patched:
        patched.setattr(Incremental, "run", lambda self: (runs.append(self), run(self))[1])
        workspace.generate()
    if not runs:
        return set(), set()
    rendered = {name for name, unit in runs[0].units.items() if isinstance(unit, Rendered)}
    return rendered, set(runs[0].ops.linked)


def test_nothing_changed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reached(workspace, monkeypatch) == (set(), set())


def test_equations_of_an_op_reach_neither_models_nor_passes(
    workspace: Workspace, edited: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.edit(*EDITED)
    units, ops = reached(workspace, monkeypatch)
    assert "ops norm" in units and "docs norm" in units
    assert not [unit for unit in units if unit.startswith(("model ", "passes"))]
    assert len(ops) < 60
    assert workspace.tree() == edited


def test_equations_that_change_a_partial_sum_reach_the_models(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`add` of a partial sum is linear; once it is not, the models that add one have findings, in every run."""
    workspace.edit("ops/elementwise.yaml", "x + y", "exp(x) + y")
    expected = outcome(workspace.drift)
    assert expected
    assert outcome(lambda: driver.generate(out=workspace.out, base=workspace.specs)) == expected


def test_an_edit_reaches_the_models_that_use_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operand, a block of other models, and an ancestor: qwen3_moe extends qwen3, which extends llama."""
    workspace.edit("ops/norm.yaml", "default: 1.0e-6", "default: 1.0e-5")
    units, _ = reached(workspace, monkeypatch)
    assert "model llama" in units and "model gpt2" not in units
    workspace.edit("models/qwen3_moe.yaml", "hf: gate.weight", "hf: router.weight")
    units, _ = reached(workspace, monkeypatch)
    assert {"model mixtral", "model qwen2_moe", "model qwen3_moe"} <= units
    assert not {"model llama", "model qwen3", "model deepseek_v3"} & units
    workspace.edit("models/llama.yaml", "hf: o_proj.weight", "hf: out_proj.weight")
    units, _ = reached(workspace, monkeypatch)
    assert {"model llama", "model qwen3", "model qwen3_moe", "model mixtral"} <= units and "model gpt2" not in units
    assert workspace.drift() == []


def test_counts_are_checked_again_where_rules_may_fire_otherwise(workspace: Workspace) -> None:
    counted: list[Path] = []

    def count(tree: Path, is_overlay: bool) -> list[Missed]:
        counted.append(tree)
        return []

    def generate_with_counts() -> int:
        generate([workspace.specs], workspace.out, driver.BASE_OUT, count)
        return len(counted)

    assert generate_with_counts() == 0
    workspace.edit("ops/activation.yaml", "* sigmoid(g)", "* sigmoid(g) * 1.0")  # another docstring, and another cost
    assert generate_with_counts() == 0
    workspace.edit("ops/norm.yaml", "default: 1.0e-6", "default: 1.0e-5")
    assert generate_with_counts() == 1
    workspace.edit("models/llama.yaml", "eps=eps", "eps=0.001")
    assert generate_with_counts() == 2


# trees and states that are not as the last run left them


@pytest.mark.parametrize("path", ["ops/norm.py", "kernels/cpu/norm.cpp", "docs/models/llama.md", MANIFEST])
@pytest.mark.parametrize("text", ["", "broken", None])
def test_a_damaged_file_is_repaired(workspace: Workspace, path: str, text: str | None) -> None:
    before = (workspace.out / path).read_bytes()
    if text is None:
        (workspace.out / path).unlink()
    else:
        (workspace.out / path).write_text(f"generated by sagellm {text}")
    workspace.generate()
    assert (workspace.out / path).read_bytes() == before


@pytest.mark.parametrize("text", ["", '{"generator": 1}', "\udc80"])
def test_a_damaged_state_is_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / FILE).write_bytes(text.encode(errors="surrogateescape"))
    assert load_state(tmp_path) == State()


def test_a_damaged_state_is_no_error(workspace: Workspace, edited: dict[str, bytes]) -> None:
    (workspace.out / FOLDER / FILE).write_bytes(b"\x80")
    workspace.edit(*EDITED)
    workspace.generate()
    assert workspace.tree() == edited


def test_an_interrupted_run_is_completed_by_the_next(
    workspace: Workspace, edited: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.edit(*EDITED)
    real, count = Path.replace, 0

    def interrupted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workspace.generate()
    monkeypatch.undo()
    assert workspace.tree() != edited
    workspace.generate()
    assert workspace.tree() == edited


def test_a_run_that_left_no_state_is_no_error(
    workspace: Workspace, edited: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is then that of the run before, which knows other files."""
    before = workspace.tree()
    monkeypatch.setattr(update, "save_state", lambda *_: None)
    workspace.edit(*EDITED)
    workspace.generate()
    assert workspace.tree() == edited
    workspace.edit(EDITED[0], EDITED[2], EDITED[1])
    workspace.generate()
    assert workspace.tree() == before


def test_another_generator_keeps_nothing_but_formatted_text(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = workspace.out / FOLDER / FILE
    data, before = json.loads(state.read_text()), workspace.tree()
    state.write_text(json.dumps(data | {"generator": "older"}))
    units, ops = reached(workspace, monkeypatch)
    assert {"ops norm", "model llama", "passes", "support", "tables"} <= units
    assert len(ops) > 80
    assert workspace.tree() == before


TEMPLATE_EDIT = """
import pathlib, sys
from sageLLM.codegen import driver
assert str(driver.PACKAGE).startswith(sys.argv[1]), driver.PACKAGE
out = pathlib.Path(sys.argv[1], "out")
assert driver.generate(out=out).changed == ()
template = driver.PACKAGE / "templates" / "ops.py.jinja"
template.write_text(template.read_text().replace("class {{", "class  {{", 1) + "# edited\\n")
driver.generate(out=out)
assert (out / "ops" / "norm.py").read_text().endswith("# edited\\n")
assert driver.check(out=out) == []
"""


def test_a_template_reaches_the_files_that_it_makes(generated: Workspace, tmp_path: Path) -> None:
    """In a copy of the package, for which the state of the tree holds as well."""
    shutil.copytree(generated.out, tmp_path / "out")
    package = tmp_path / "sageLLM"
    for name in ("codegen", "templates"):
        shutil.copytree(driver.PACKAGE / name, package / name)
    shutil.copytree(generated.specs, package / "specs")
    shutil.copy(driver.PACKAGE / "__init__.py", package) if (driver.PACKAGE / "__init__.py").is_file() else (
        package / "__init__.py"
    ).touch()
    env = os.environ | {"PYTHONPATH": str(tmp_path), "SAGELLM_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", TEMPLATE_EDIT, str(tmp_path)], check=True, env=env, cwd=tmp_path)


# overlays

OVERLAY = """schema: ops/v1
ops:
  halved:
    summary: Half of it.
    op_type: ELEMENTWISE
    inputs: {x: "E[..., H]"}
    outputs: {y: "E[..., H]"}
    compute: y = E(f32(x) * 0.5)
"""


@pytest.mark.parametrize("path", ["mine/halved.yaml", "mine/specs/ops/norm.yaml"])
def test_an_overlay_links_only_what_it_uses_of_a_base_that_was_checked(
    generated: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Also if all its paths are those of files of the package."""
    overlay = tmp_path / path.partition("/ops")[0].removesuffix("/halved.yaml")
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(OVERLAY)
    runs: list[Incremental] = []
    run = Incremental.run
    monkeypatch.setattr(Incremental, "run", lambda self: (runs.append(self), run(self))[1])
    generate([generated.specs, overlay], tmp_path / "out", generated.out)
    assert set(runs[0].ops.linked) == {"halved"}
    assert driver.check([overlay], tmp_path / "out", generated.specs) == []


def test_an_overlay_without_a_checked_base_reports_mistakes_in_the_base(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "halved.yaml").write_text(OVERLAY)
    workspace.edit("models/llama.yaml", "rms_norm(", "rms_nrom(")
    found = outcome(lambda: driver.generate([tmp_path / "mine"], tmp_path / "out", workspace.specs))
    assert found == outcome(lambda: driver.load_and_link([tmp_path / "mine"], workspace.specs))
    assert "rms_nrom" in found
