"""Compiles files of kernels at the same time, the largest ones first."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from sageLLM.runtime.kernels.cpu.build import Target, build, built
from sageLLM.runtime.kernels.cpu.compiler import HEADERS, Compiler

MAX_COMPILERS = 4
"""Compilers that run at the same time. More of them would wait for the largest file, and each takes up to 0.3 GB."""
LARGE = re.compile(r"^    (attend|(grouped_)?gemm\w*)\(", re.MULTILINE)
"""The calls of functions that take longer to compile than all else in a file."""


@dataclass(frozen=True, slots=True)
class BuildJob:
    """A library with these kernels, or with all of the file."""

    target: Target
    kernels: frozenset[str] | None = None

    @property
    def cost(self) -> tuple[bool, int]:
        """An estimate of the time: large functions, the longest for forms of codes, which have flags."""
        return bool(LARGE.search(self.target.source.read_text(encoding="utf-8"))), len(self.target.flags)


def hand_written(name: str, element: str = "f32") -> BuildJob:
    """The job of a file next to this one."""
    return BuildJob(Target(HEADERS / name, element))


def build_all(jobs: Iterable[BuildJob], compiler: Compiler | None) -> None:
    """Builds the libraries that are not cached; an error or Ctrl-C stops all compilers. Raises CompileError.

    Without any it starts no threads: where memory is full, Python would wait for them for ever.
    """
    missing = [job for job in dict.fromkeys(jobs) if built(job.target, compiler, job.kernels) is None]
    if not missing:
        return
    missing.sort(key=lambda job: job.cost, reverse=True)
    stop = Event()
    with ThreadPoolExecutor(max(2, min(MAX_COMPILERS, os.cpu_count() or 1))) as pool:
        try:
            list(pool.map(lambda job: _build(job, compiler, stop), missing))
        finally:
            stop.set()


def _build(job: BuildJob, compiler: Compiler | None, stop: Event) -> Path:
    target = job.target
    return build(target.source, target.element, compiler, target.flags, stop, job.kernels)
