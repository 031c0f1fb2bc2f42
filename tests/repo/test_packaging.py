"""Tests of the wheel, a wheel from the sdist and an editable install, each in a clean environment."""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from sageLLM import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
HATCH = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
CACHES = {"__pycache__", ".cache"}
INSTALL_OPTIONS = ("--no-deps", "--no-index", "--no-compile")  # modules are compiled when they are imported
COMPILED = tuple(HATCH["targets"]["wheel"]["hooks"]["custom"]["packages"])
FOLDERS = sorted(folder for folder in HATCH["targets"]["wheel"]["sources"] if folder != "_dev/sageLLM")


@pytest.mark.parametrize("folder", FOLDERS)
def test_dev_package_links_to_the_folder(folder: str) -> None:
    """Without the link an editable install succeeds, and then does not import."""
    link = ROOT / "_dev/sageLLM" / folder
    assert link.is_symlink(), f"_dev/sageLLM/{folder} must be a symlink; on Windows: git config core.symlinks true"
    assert link.readlink() == Path(f"../../{folder}")


def test_every_link_is_shipped() -> None:
    assert sorted(path.name for path in (ROOT / "_dev/sageLLM").iterdir() if path.is_symlink()) == FOLDERS


def test_wheel_and_sdist_ship_the_same_files() -> None:
    assert HATCH["targets"]["wheel"]["only-include"] == HATCH["targets"]["sdist"]["only-include"]
    assert HATCH["dev-mode-dirs"] == ["_dev"]


def test_compiled_classes_have_no_interpreted_subclass() -> None:
    """With one, the wheel of `make compiled` could not be imported."""
    compiled: set[str] = set()
    bases: dict[str, Path] = {}
    for path in (ROOT / "runtime").rglob("*.py"):
        classes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ClassDef)]
        if path.relative_to(ROOT).as_posix().startswith(COMPILED):
            compiled.update(node.name for node in classes)
        else:
            bases.update({ast.unparse(base): path for node in classes for base in node.bases})
    assert "BaseScheduler" in compiled
    assert not {name: bases[name] for name in bases.keys() & compiled}


def run(*command: str | Path, cwd: Path) -> str:
    """Stdout of a command that must succeed, run without the repository on the path."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}{done.stderr}"
    return done.stdout


def build(target: str, source: Path, out: Path) -> Path:
    """The archive that hatchling makes of the source tree; needs no network."""
    backend = f"import hatchling.build, sys; print(hatchling.build.build_{target}(sys.argv[1]))"
    return out / run(sys.executable, "-c", backend, out, cwd=source).split()[-1]


def build_wheel_from_sdist(out: Path) -> Path:
    with tarfile.open(build("sdist", ROOT, out)) as sdist:
        sdist.extractall(out / "sdist", filter="data")
    [source] = (out / "sdist").iterdir()
    return build("wheel", source, out)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def install(archive: Path, home: Path) -> Path:
    """The python of a new environment that holds the archive and sees this environment's third-party packages."""
    venv.create(home)
    python = home / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *INSTALL_OPTIONS, archive, cwd=home)
    # After pip, which would otherwise take the sageLLM of this environment for the installed one. Paths in a .pth file
    # are not searched for further .pth files, so an editable install of this environment remains invisible.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    third_party = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "third_party.pth").write_text("\n".join(third_party), encoding="utf-8")
    python.with_name("ruff").symlink_to(Path(sysconfig.get_path("scripts"), "ruff"))  # a program, not found on a path
    return python


@pytest.fixture(scope="module")
def wheel_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("clean"))


def shipped() -> dict[str, int]:
    """Size of each file of the package, by its path inside it."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    files = {path.relative_to(ROOT).as_posix(): path for path in found if not CACHES.intersection(path.parts)}
    files |= {path.name: path for path in (ROOT / "_dev/sageLLM").iterdir() if path.is_file()}
    return {name: path.stat().st_size for name, path in files.items()}


def test_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {info.filename: info.file_size for info in archive.infolist() if "dist-info" not in info.filename}
    assert entries == {f"sageLLM/{name}": size for name, size in shipped().items()}


def test_wheel_from_the_sdist_is_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert build_wheel_from_sdist(tmp_path).read_bytes() == wheel.read_bytes()


LOOK = """
import importlib, json, sys
from importlib.resources import files
import sageLLM
for name in ("runtime.core", "runtime.execution_graph", "runtime.scheduler", "codegen.schema", "generated"):
    importlib.import_module(f"sageLLM.{name}")
root = files("sageLLM")
sizes = {name: len(root.joinpath(*name.split("/")).read_bytes()) for name in json.load(open(sys.argv[1]))}
json.dump([sageLLM.__file__, sageLLM.__version__, sizes], sys.stdout)
"""


def look(python: Path, cwd: Path) -> tuple[Path, str, dict[str, int]]:
    """The path of the package in the environment, its version, and the size of each resource that it finds."""
    names = cwd / "names.json"
    names.write_text(json.dumps([*shipped()]), encoding="utf-8")
    home, version, sizes = json.loads(run(python, "-I", "-c", LOOK, names, cwd=cwd))
    return Path(home), version, sizes


def test_wheel_imports_and_finds_its_resources(wheel_python: Path, wheel: Path, tmp_path: Path) -> None:
    home, version, sizes = look(wheel_python, tmp_path)
    assert home.is_relative_to(wheel_python.parents[1])
    assert wheel.name == f"sagellm-{version}-py3-none-any.whl"
    assert sizes == shipped()


def test_editable_install_imports_and_finds_its_resources(tmp_path: Path) -> None:
    python = install(build("editable", ROOT, tmp_path), tmp_path / "venv")
    home, _, sizes = look(python, tmp_path)
    assert home == ROOT / "_dev/sageLLM/__init__.py"
    assert sizes == shipped()


def test_the_wheel_brings_the_command(wheel_python: Path, tmp_path: Path) -> None:
    assert "generate" in run(wheel_python.with_name("sagellm"), "--help", cwd=tmp_path)


def printed_command(done: subprocess.CompletedProcess[str]) -> tuple[str, ...]:
    """The `sagellm` command that the last line of stderr tells the user to run."""
    assert done.returncode == 0, done.stdout + done.stderr
    return tuple(shlex.split(done.stderr.splitlines()[-1].partition("sagellm ")[2]))


def test_scaffolds_of_the_wheel_generate_and_run(wheel_python: Path, tmp_path: Path) -> None:
    """With the command that they print. The package in site-packages is not touched."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def sagellm(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(wheel_python.with_name("sagellm")), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)

    site = next(wheel_python.parents[1].rglob("site-packages/sageLLM"))

    def installed() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in site.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    before = installed()
    done = [sagellm("new", kind, f"demo_{kind}") for kind in ("op", "model", "pass", "dialect")]
    assert {line.split("/")[0] for one in done for line in one.stdout.splitlines()} == {"my_specs"}
    assert all(f"{tmp_path}/my_specs" in one.stderr for one in done)
    [command] = {printed_command(one) for one in done}
    printed_command(generated := sagellm(*command))
    assert "wrote ops/demo_op.py" in generated.stdout
    assert installed() == before
    run(wheel_python, "-m", "pytest", "-q", "my_generated/tests", cwd=tmp_path)
    shutil.copytree(ROOT / "examples/tiny_python_model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text(encoding="utf-8"))
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"architectures": ["DemoModelForCausalLM"]}))
    found = sagellm("run", "model", "--plugin", "my_generated", "--prompt", "def main(", "--max-tokens", "8")
    params = SamplingParams(max_tokens=8, temperature=0.0)
    [here] = LLM(model=ROOT / "examples/tiny_python_model").generate(["def main("], params)
    assert found.stdout == f"def main({here.outputs[0].text}\n"
