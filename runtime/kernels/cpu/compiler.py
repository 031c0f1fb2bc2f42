"""Finds and runs the machine's C++ compiler, within a time limit."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Event
from time import monotonic

HEADERS = Path(__file__).parent
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=off", "-fvisibility=hidden", "-fno-rtti", "-Wno-psabi",
)  # fmt: skip
"""No -ffast-math: masks are infinities. No contraction: an equation rounds the same way in every kernel."""
VERSION_LIMIT, COMPILE_LIMIT = 15.0, 120.0
"""Seconds. The largest file takes 7 on one core; SAGELLM_COMPILE_TIMEOUT replaces the second limit."""
POLL = 0.2


class CompileError(RuntimeError):
    """Native kernels cannot be built or loaded; the message has the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its command, with the arguments that CXX may add, and the version that it reports."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler | None:
    """The compiler that CXX names, else g++, clang++ or c++ from the path; None if none of them runs."""
    for name, *arguments in _candidates():
        path = shutil.which(name)
        if path is not None and (compiler := _described((path, *arguments))) is not None:
            return compiler
    return None


def _candidates() -> list[tuple[str, ...]]:
    """CXX is a path, or a command with arguments such as `ccache g++` or `g++ -O2`."""
    chosen = os.environ.get("CXX", "").strip()
    if not chosen:
        return [("g++",), ("clang++",), ("c++",)]
    if shutil.which(chosen) is not None:
        return [(chosen,)]
    try:
        return [tuple(shlex.split(chosen))]
    except ValueError:  # an unbalanced quote
        return []


@lru_cache(maxsize=8)
def _described(command: tuple[str, ...]) -> Compiler | None:
    try:
        status, version, _ = _run([*command, "--version"], VERSION_LIMIT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if status else Compiler(command, version.strip())


def compile_flags() -> tuple[str, ...]:
    """The flags of every file; SAGELLM_KERNEL_FLAGS adds to them, as for sanitizers."""
    return (*FLAGS, *os.environ.get("SAGELLM_KERNEL_FLAGS", "").split())


def compile_library(
    source: Path, element: str, compiler: Compiler, flags: Sequence[str], library: Path, stop: Event | None = None
) -> None:
    """Compiles a file to a shared library. Raises CompileError, also when `stop` is set meanwhile.

    Symbols of `thread_pool.cpp` are resolved when the library is loaded.
    """
    later = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    command = [*compiler.command, "-shared", *compile_flags(), *flags, f"-DSAGE_ELEMENT={element}", f"-I{HEADERS}",
               str(source), *later, "-o", str(library)]  # fmt: skip
    name, limit = compiler.command[0], _compile_limit()
    try:
        # Intermediate files go next to the library: what a killed compiler leaves is deleted with them.
        status, _, errors = _run(command, limit, stop, TMPDIR=str(library.parent))
    except subprocess.TimeoutExpired:
        raise CompileError(
            f"{name} was stopped after {limit:g} s at {source.name}; set SAGELLM_COMPILE_TIMEOUT to more seconds"
        ) from None
    except OSError as error:
        raise CompileError(f"cannot run {name}: {error.strerror}") from None
    if status:
        reason = "\n".join(errors.strip().splitlines()[:12]) or f"exit status {status}"
        raise CompileError(f"{name} could not build {source.name}:\n{reason}")
    if not library.is_file():
        raise CompileError(f"{name} wrote no library for {source.name}; set CXX to a C++ compiler")


def _compile_limit() -> float:
    text = os.environ.get("SAGELLM_COMPILE_TIMEOUT")
    try:
        limit = float(text) if text else COMPILE_LIMIT
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise CompileError(f"SAGELLM_COMPILE_TIMEOUT must be a number of seconds above 0, got {text!r}")
    return limit


def _run(command: list[str], limit: float, stop: Event | None = None, **environment: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr. Raises OSError, or TimeoutExpired after the limit or when `stop` is set.

    The command gets its own process group, because a compiler's work is done by its child processes. They do not see
    Ctrl-C then, so that any exception here must end them.
    """
    deadline = monotonic() + limit
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C", **environment},
        process_group=0,
    ) as process:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=POLL)
                    return process.returncode, output, errors
                if monotonic() > deadline or (stop is not None and stop.is_set()):
                    raise subprocess.TimeoutExpired(command, limit)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
