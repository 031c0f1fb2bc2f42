"""Builds and loads C++ libraries; a built library is cached under a hash of all its inputs."""

import ctypes
import hashlib
import os
import platform
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

from sageLLM.runtime.kernels.cpu.cache import build_folder, find_library, private_folder, store_library
from sageLLM.runtime.kernels.cpu.compiler import HEADERS, CompileError, Compiler, compile_flags, compile_library


def build(
    source: Path, element: str, compiler: Compiler | None, flags: tuple[str, ...] = (), stop: Event | None = None
) -> Path:
    """The shared library of a source file for one element type; compiled unless it is cached.

    Without a compiler, a library that any compiler has built is used. Raises CompileError, also when `stop` is set.
    Several processes may build the same library.
    """
    try:
        return _cached_or_built(source, element, compiler, flags, stop)
    except OSError as error:
        raise CompileError(
            f"cannot use the kernel cache: {error}; set SAGELLM_CACHE_DIR to a folder that only you can write to"
        ) from error


def is_built(source: Path, element: str, compiler: Compiler | None, flags: tuple[str, ...] = ()) -> bool:
    """Whether `build` finds the library in the cache."""
    try:
        return find_library(private_folder(), _prefix(source, element, compiler, flags)) is not None
    except OSError:
        return False


def _cached_or_built(
    source: Path, element: str, compiler: Compiler | None, flags: tuple[str, ...], stop: Event | None
) -> Path:
    folder, prefix = private_folder(), _prefix(source, element, compiler, flags)
    cached = find_library(folder, prefix)
    if cached is not None:
        return cached
    if compiler is None:
        chosen = os.environ.get("CXX")
        named = f" for CXX={chosen!r}" if chosen else ""
        raise CompileError(f"no C++ compiler found{named}; install g++ or clang++, or set CXX to one")
    with build_folder(folder) as draft:
        fresh = draft / "library.so"
        compile_library(source, element, compiler, flags, fresh, stop)
        return store_library(fresh, folder, prefix)


def _prefix(source: Path, element: str, compiler: Compiler | None, flags: tuple[str, ...]) -> str:
    """The beginning of the name of a library in the cache; without a compiler that of all compilers."""
    prefix = f"{source.stem}-{element}-{_inputs_key(source, flags)}-"
    return prefix if compiler is None else f"{prefix}{_digest(*compiler.command, compiler.version)[:8]}-"


def load(library: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Loads a library that `build` returned. Raises CompileError, as for a file system mounted noexec."""
    try:
        return ctypes.CDLL(str(library), mode=mode)
    except OSError as error:
        raise CompileError(
            f"cannot load {error}; delete the file, or set SAGELLM_CACHE_DIR to a folder that is not mounted noexec"
        ) from error


def symbol(library: ctypes.CDLL, name: str) -> Any:
    """A function of a library. Raises CompileError if it has none of this name."""
    try:
        return getattr(library, name)
    except AttributeError as error:
        raise CompileError(f"{error}; delete the file to build it again") from error


def _inputs_key(source: Path, flags: tuple[str, ...]) -> str:
    """A hash of everything that determines a library but the compiler."""
    files = (source, *sorted(HEADERS.glob("*.h")))
    return _digest(*(file.read_bytes() for file in files), *compile_flags(), *flags, _processor())[:20]


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _processor() -> str:
    """The processor features that -march=native depends on: different machines may share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux, or hidden in a sandbox
        lines = []
    features = (line for line in lines if line.startswith(("flags", "Features")))
    return next(features, f"{platform.system()} {platform.machine()}")
