"""Builds generated C++ with the machine's compiler; libraries are cached under a hash of all inputs."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HEADERS = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off", "-fvisibility=hidden", "-fno-rtti", "-Wno-psabi",
)  # fmt: skip
"""No -ffast-math: masks are infinities. No contraction: an equation rounds the same way in every kernel."""


class CompileError(RuntimeError):
    """The compiler rejected a generated file or could not be run; the message has its first errors."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler and the version that it reports."""

    path: str
    version: str

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of every file; SAGELLM_KERNEL_FLAGS adds to them, as for sanitizers."""
        return (*FLAGS, *os.environ.get("SAGELLM_KERNEL_FLAGS", "").split())


def find_compiler() -> Compiler | None:
    """The compiler that CXX names, else g++, clang++ or c++ from the path; None without any."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    path = next((found for name in names if (found := shutil.which(name))), None)
    return _described(path) if path else None


@lru_cache(maxsize=4)
def _described(path: str) -> Compiler | None:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return None if done.returncode else Compiler(path, done.stdout.strip())


def cache_folder() -> Path:
    """SAGELLM_CACHE_DIR, else sagellm below XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("SAGELLM_CACHE_DIR"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sagellm"


def build(source: Path, element: str, compiler: Compiler, flags: tuple[str, ...] = ()) -> Path:
    """The shared library of a generated file for one element type; compiled unless it is cached.

    Raises CompileError. Several processes may build the same library: each writes to a temporary file and renames it.
    """
    library = cache_folder() / "kernels" / f"{source.stem}-{element}-{_key(source, element, compiler, flags)}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder, library.name)
            _compile(source, element, compiler, flags, fresh)
            fresh.replace(library)
    return library


def _key(source: Path, element: str, compiler: Compiler, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in (source, *sorted(HEADERS.glob("*.h"))):
        digest.update(file.read_bytes())
    for text in (compiler.path, compiler.version, *compiler.flags, *flags, element, _processor()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


@lru_cache(maxsize=1)
def _processor() -> str:
    """The processor features that -march=native depends on: different machines may share a cache."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return sys.platform
    return next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), "")


def _compile(source: Path, element: str, compiler: Compiler, flags: tuple[str, ...], library: Path) -> None:
    """Symbols of `thread_pool.cpp` are resolved when the library is loaded."""
    later = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    _run([compiler.path, "-shared", *compiler.flags, *flags, f"-DSAGE_ELEMENT={element}", f"-I{HEADERS}", str(source),
          *later, "-o", str(library)], source)  # fmt: skip


def _run(command: list[str], source: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = "\n".join(done.stderr.strip().splitlines()[:12])
        raise CompileError(f"{command[0]} could not build {source.name}:\n{errors}")
