"""Builds and loads C++ libraries; a built library is cached under a hash of all its inputs.

A library has all kernels of a file, or those that a model needs, which compile in half the time: its name has a bit
for each kernel.
"""

import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

from sageLLM.runtime.kernels.cpu.cache import build_folder, find_library, private_folder, store_library
from sageLLM.runtime.kernels.cpu.compiler import HEADERS, CompileError, Compiler, compile_flags, compile_library

KERNEL = re.compile(r"^SAGE_KERNEL\((\w+)\)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Target:
    """A source file, with the element type and the flags that it is compiled with."""

    source: Path
    element: str
    flags: tuple[str, ...] = ()

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels of the file, in its order."""
        return tuple(KERNEL.findall(self.source.read_text(encoding="utf-8")))

    def bits(self, kernels: Collection[str] | None) -> int:
        """A bit for each of these kernels, by default for all."""
        return sum(1 << i for i, name in enumerate(self.kernels) if kernels is None or name in kernels)

    def kernels_of(self, library: Path) -> list[str]:
        """The kernels that a library of this target has, by its name."""
        bits = _bits_of(library.name)
        return [name for i, name in enumerate(self.kernels) if bits >> i & 1]


def build(
    source: Path,
    element: str,
    compiler: Compiler | None,
    flags: tuple[str, ...] = (),
    stop: Event | None = None,
    kernels: Collection[str] | None = None,
) -> Path:
    """The shared library of a source file for one element type; compiled unless it is cached.

    It has at least `kernels`, by default all of the file. Without a compiler, a library that any compiler has built is
    used. Raises CompileError, also when `stop` is set. Several processes may build the same library.
    """
    try:
        return _cached_or_built(Target(source, element, flags), compiler, stop, kernels)
    except OSError as error:
        raise CompileError(
            f"cannot use the kernel cache: {error}; set SAGELLM_CACHE_DIR to a folder that only you can write to"
        ) from error


def built(target: Target, compiler: Compiler | None, kernels: Collection[str] | None = None) -> Path | None:
    """The cached library with these kernels, by default all of the file; None if there is none."""
    try:
        return _cached(private_folder(), target, compiler, target.bits(kernels))
    except OSError:
        return None


def _cached(folder: Path, target: Target, compiler: Compiler | None, bits: int) -> Path | None:
    return find_library(folder, _prefix(target, compiler), lambda name: not bits & ~_bits_of(name))


def _bits_of(library: str) -> int:
    """The bits in the name of a library; 0 for a name of another form."""
    found = re.search(r"-([0-9a-f]+)-[0-9a-f]+\.so$", library)
    return int(found[1], 16) if found else 0


def _cached_or_built(
    target: Target, compiler: Compiler | None, stop: Event | None, kernels: Collection[str] | None
) -> Path:
    folder, bits = private_folder(), target.bits(kernels)
    cached = _cached(folder, target, compiler, bits)
    if cached is not None:
        return cached
    if compiler is None:
        chosen = os.environ.get("CXX")
        named = f" for CXX={chosen!r}" if chosen else ""
        raise CompileError(f"no C++ compiler found{named}; install g++ or clang++, or set CXX to one")
    only = () if bits == target.bits(None) else (_only(target, bits),)
    with build_folder(folder) as draft:
        fresh = draft / "library.so"
        compile_library(target.source, target.element, compiler, (*target.flags, *only), fresh, stop)
        return store_library(fresh, folder, f"{_prefix(target, compiler)}{bits:x}-")


def _only(target: Target, bits: int) -> str:
    """The flag for the kernels of these bits (`kernel.h`)."""
    return '-DSAGE_ONLY="{}"'.format("".join(f"{name} " for i, name in enumerate(target.kernels) if bits >> i & 1))


def _prefix(target: Target, compiler: Compiler | None) -> str:
    """The beginning of the name of a library in the cache; without a compiler that of all compilers."""
    prefix = f"{target.source.stem}-{target.element}-{_inputs_key(target)}-"
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


def _inputs_key(target: Target) -> str:
    """A hash of everything that determines a library with all kernels, but the compiler."""
    headers = tuple((path, path.stat().st_mtime_ns) for path in sorted(HEADERS.glob("*.h")))
    return _digest(target.source.read_bytes(), _headers_key(headers), *compile_flags(), *target.flags, _processor())[
        :20
    ]


@lru_cache(maxsize=4)
def _headers_key(headers: tuple[tuple[Path, int], ...]) -> str:
    """A hash of the headers; their times are those of the last change, which may occur while the process runs."""
    return _digest(*(path.read_bytes() for path, _ in headers))


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
