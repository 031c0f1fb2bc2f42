"""Spec folders: an overlay may have the names of the package's folder and files, and no file is skipped silently."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sageLLM.codegen import driver
from sageLLM.codegen.diagnostics import SpecErrors
from sageLLM.codegen.folders import find_file, spec_files
from sageLLM.codegen.load import load_specs
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.registry.plugins import load_registry

OP = """\
schema: ops/v1
ops:
  {name}:
    summary: Half of it.
    op_type: ELEMENTWISE
    inputs: {{x: "E[..., H]"}}
    outputs: {{y: "E[..., H]"}}
    compute: y = E(f32(x) * 0.5)
"""


def overlay(folder: Path, **ops: str) -> Path:
    """A spec folder with one op in each ops file: `norm="halved"` is the op `halved` in ops/norm.yaml."""
    (folder / "ops").mkdir(parents=True)
    for stem, name in ops.items():
        (folder / "ops" / f"{stem}.yaml").write_text(OP.format(name=name))
    return folder


def test_every_path_of_the_package_may_be_used_again(tmp_path: Path) -> None:
    paths = [path.relative_to(driver.BASE_SPECS) for path in driver.BASE_SPECS.rglob("*.yaml")]
    for i, path in enumerate(paths):
        (tmp_path / "specs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "specs" / path).write_text(OP.format(name=f"op_{i}"))
    raw = load_specs([driver.BASE_SPECS, tmp_path / "specs"])
    own = {entry.doc.file: name for name, entry in raw.ops.items() if not raw.is_base(entry)}
    assert own == {f"specs/{path.as_posix()}": f"op_{i}" for i, path in enumerate(paths)}
    base = load_specs([driver.BASE_SPECS])
    for kind in ("ops", "models", "passes", "pass_stages", "hardware", "dims", "op_types", "step_inputs"):
        entries = getattr(raw, kind)
        assert getattr(base, kind).keys() == {name for name, entry in entries.items() if raw.is_base(entry)}


def test_a_folder_named_specs_generates_all_its_ops(tmp_path: Path) -> None:
    specs = overlay(tmp_path / "specs", norm="halved", own="quartered")
    driver.generate([specs], tmp_path / "out")
    registry = load_registry([tmp_path / "out"])
    assert registry.ops["halved"].spec == "specs/ops/norm.yaml: halved"
    assert {"halved", "quartered"} <= registry.kernels.keys()
    assert driver.check([specs], tmp_path / "out") == []


def test_findings_show_both_files_of_one_path(tmp_path: Path) -> None:
    specs = overlay(tmp_path / "specs", norm="rms_norm")
    done = CliRunner().invoke(app, ["lint", "--specs", str(specs)])
    assert "specs/ops/norm.yaml:3:3: error[SAGE015]: 'rms_norm' is defined twice\n    3 |   rms_norm:" in done.stdout
    line = next(i for i, text in enumerate((driver.BASE_SPECS / "ops/norm.yaml").open(), 1) if "  rms_norm:" in text)
    assert f"first defined here: sageLLM/specs/ops/norm.yaml:{line}:3\n    {line} |   rms_norm:" in done.stdout
    folders = [driver.BASE_SPECS, specs]
    assert find_file("specs/ops/norm.yaml", folders) == specs / "ops/norm.yaml"
    assert find_file("sageLLM/specs/ops/norm.yaml", folders) == driver.BASE_SPECS / "ops/norm.yaml"


def test_overlays_of_one_name_are_merged(tmp_path: Path) -> None:
    first, second = overlay(tmp_path / "a/specs", norm="halved"), overlay(tmp_path / "b/specs", own="quartered")
    groups = spec_files([driver.BASE_SPECS, first, second])
    assert [list(group) for group in groups[1:]] == [["specs/ops/norm.yaml"], ["specs/ops/own.yaml"]]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(*folders: Path) -> str:
    with pytest.raises(SpecErrors) as caught:
        spec_files([driver.BASE_SPECS, *folders])
    with pytest.raises(SpecErrors, match="SAGE50"):
        driver.generate(folders, Path("out"))
    return str(caught.value)


def test_files_with_one_name_in_two_overlays_are_refused(tmp_path: Path) -> None:
    first, second = overlay(tmp_path / "a/specs", norm="halved"), overlay(tmp_path / "b/specs", norm="quartered")
    places = f"{first}/ops/norm.yaml and {second}/ops/norm.yaml"
    assert refused(first, second) == f"error[SAGE504]: two spec folders contain 'specs/ops/norm.yaml': {places}"


def test_a_folder_is_used_once(tmp_path: Path) -> None:
    specs = overlay(tmp_path / "mine", norm="halved")
    (tmp_path / "link").symlink_to(specs)
    assert f"the spec folder '{tmp_path}/link' is used twice" in refused(specs, tmp_path / "link")
    assert refused(driver.BASE_SPECS) == (
        f"error[SAGE502]: '{driver.BASE_SPECS}' is the package's spec folder, which is always used"
    )


@pytest.mark.parametrize("name", ["own.yml", "own.YAML", "own.YML"])
def test_no_spec_file_is_skipped_silently(tmp_path: Path, name: str) -> None:
    specs = overlay(tmp_path / "mine", norm="halved")
    shutil.copy(specs / "ops/norm.yaml", specs / name)
    assert refused(specs) == f"error[SAGE502]: a spec file must end with .yaml, got '{specs / name}'"


def test_a_folder_without_specs_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing") == "error[SAGE502]: a spec folder must contain .yaml files, got 'nothing'"


def test_plugins_with_spec_folders_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    first, second = overlay(tmp_path / "a/specs", norm="halved"), overlay(tmp_path / "b/specs", norm="quartered")
    out = tmp_path / "out"
    driver.generate([first], out)
    before = (out / "ops/norm.py").read_text()
    with pytest.raises(SpecErrors) as caught:
        driver.generate([second], out)
    assert str(caught.value) == f"error[SAGE505]: '{out}' contains the code of other specs ({first})"
    assert (out / "ops/norm.py").read_text() == before
    assert driver.generate([first], out).changed == ()
    driver.generate([first, overlay(tmp_path / "c/more", own="thirds")], out)  # one more folder of the same plugin


def test_a_plugin_may_be_moved_or_copied(tmp_path: Path) -> None:
    specs = overlay(tmp_path / "a/specs", norm="halved")
    driver.generate([specs], tmp_path / "a/out")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    (tmp_path / "copy/specs/ops/norm.yaml").rename(tmp_path / "copy/specs/ops/other.yaml")
    assert "ops/other.py" in driver.generate([tmp_path / "copy/specs"], tmp_path / "copy/out").changed
    (tmp_path / "a/specs").rename(tmp_path / "a/moved").rename(tmp_path / "a/again")
    (tmp_path / "a/again").rename(tmp_path / "specs")
    assert driver.generate([tmp_path / "specs"], tmp_path / "a/out").changed == ()
