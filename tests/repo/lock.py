"""Writes the lock files of `make setup`: the pins of constraints.txt with the hashes of all files of each release.

requirements.lock has what running and serving require, requirements-test.lock what testing requires besides. torch and
Triton are left out, since their builds depend on the GPU: they are installed by constraints.txt. pip-compile, in
.venv-lock, asks the package index that pip is configured for; no index is written to the files.
"""

import re
import subprocess
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
UNLOCKED = ("torch", "triton")
GPU_LIBRARIES = ("nvidia", "cuda", "rocm", "pytorch", "intel")
BUILD = "hatchling"
"""The build backend, as the package is installed without build isolation."""
HEADER = "# Made by `make lock` from constraints.txt, for Linux and Python 3.11; see tests/repo/lock.py.\n"
OPTIONS = ["--quiet", "--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-header", "--no-annotate"]
OPTIONS += ["--no-emit-index-url", "--no-emit-trusted-host", "--no-emit-find-links", "--output-file=-", "-"]


def dependencies() -> dict[str, list[str]]:
    """The dependencies in pyproject.toml by extra; those without an extra under ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def locked(requirements: list[str]) -> list[str]:
    """The requirements of packages that are in a lock file."""
    return [one for one in requirements if Requirement(one).name not in UNLOCKED]


def pure(of_torch: list[str]) -> list[str]:
    """The names in torch's requirements, without extras and libraries of GPU vendors."""
    parsed = [Requirement(one) for one in of_torch]
    used = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [one.name for one in used if not one.name.startswith(GPU_LIBRARIES)]


def entries(lock: str) -> dict[str, str]:
    """The lines of each package in a lock file, by name."""
    return {text.partition("==")[0]: text for text in re.findall(r"^\S+==.*\n(?: .*\n)*", lock, re.MULTILINE)}


def compiled(requirements: list[str]) -> dict[str, str]:
    """The entries of all packages that the requirements lead to."""
    asked = "\n".join([f"-c {ROOT / 'constraints.txt'}", *requirements])
    command = [str(ROOT / ".venv-lock" / "bin" / "pip-compile"), *OPTIONS]
    return entries(subprocess.run(command, input=asked, text=True, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    declared = dependencies()
    running = [*locked(declared[""]), *locked(declared["serve"]), BUILD, *locked(pure(requires("torch") or []))]
    for_running = compiled(running)
    for_testing = compiled([*running, *locked(declared["test"])])
    added = {name: text for name, text in for_testing.items() if name not in for_running}
    for name, found in (("requirements.lock", for_running), ("requirements-test.lock", added)):
        (ROOT / name).write_text(HEADER + "".join(found[key] for key in sorted(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
