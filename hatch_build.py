"""Build hook of the wheel that compiles the scheduler and the KV manager with mypyc.

It is off by default, so that the wheel is pure Python:

    HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 pip wheel --no-deps .

The modules are compiled as they are; their sources stay in the wheel next to the extensions, which Python prefers.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# One group: calls between its modules are calls in C. Modules outside of it are not followed; their values are checked
# when they come in.
SETUP = """
import sys
from mypyc.build import mypycify
from setuptools import setup

arguments = ["--follow-imports=skip", *sys.argv[2:]]
extensions = mypycify(arguments, group_name="sagellm_scheduler", opt_level="2", debug_level="0")
setup(name="sagellm", ext_modules=extensions, script_args=["build_ext", "--build-lib", sys.argv[1]])
"""


class CompileScheduler(BuildHookInterface[Any]):
    """Adds the compiled modules to the wheel, which is then one of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the packages, unless the installation is editable: edits would have no effect."""
        if version == "editable":
            return
        self.temporary = Path(tempfile.mkdtemp())
        extensions = compile_packages(Path(self.root), self.config["packages"], self.temporary)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        for path in extensions:
            build_data["force_include"][str(path)] = str(path.relative_to(self.temporary / "lib"))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary files."""
        if version != "editable":
            shutil.rmtree(self.temporary)


def compile_packages(root: Path, packages: list[str], temporary: Path) -> list[Path]:
    """Compile copies of the packages in `temporary`; returns the extensions, below `temporary/lib`."""
    for name in packages:
        shutil.copytree(root / name, temporary / "sageLLM" / name, ignore=shutil.ignore_patterns("__pycache__"))
    modules = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*.py"))
    for module in modules:  # mypyc derives the names of the modules from the packages above them
        for folder in Path(module).parents[:-1]:
            (temporary / folder / "__init__.py").touch()
    (temporary / "setup.py").write_text(SETUP, encoding="utf-8")
    subprocess.run([sys.executable, "setup.py", "lib", *modules], cwd=temporary, check=True)
    return [path for path in sorted((temporary / "lib").rglob("*")) if path.suffix in (".so", ".pyd")]
