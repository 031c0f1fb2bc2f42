"""Runs the mutants: each must make one of its tests fail.

    python tests/mutants/run.py [--jobs N] [--only TEXT] [--list]

Each mutant runs in a fork of this process that compiles the changed text in place of the module's file, so nothing is
written. The tests run without a mutant first: they must pass. A mutant whose tests do not end counts as caught. Tests
that compute are bounded by processor time, so that a loaded machine does not end them early.
"""

import argparse
import importlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import CodeType

import pytest
from codegen_mutants import CODEGEN
from dialect_mutants import DIALECTS
from kv_mutants import KV
from mutant import ROOT, Mutant
from pass_mutants import PASSES
from scheduler_mutants import SCHEDULER
from simulator_mutants import SIMULATOR

MUTANTS: tuple[Mutant, ...] = (*SCHEDULER, *SIMULATOR, *KV, *CODEGEN, *PASSES, *DIALECTS)
MAX_CPU_S = 60
TIMEOUT_S = 20 * MAX_CPU_S
SLOW_S = 15
PRELOADED = ("numpy", "networkx", "yaml", "pydantic", "jinja2", "typer")
"""Packages that the tests import, once for all forks. Not torch: a fork of it takes a second."""
SURVIVED, FAILED = 0, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="mutants with this text in the name or the file")
    parser.add_argument("--list", action="store_true", help="print the mutants")
    args = parser.parse_args()
    chosen = [one for one in MUTANTS if args.only in f"{one.file}: {one.name}"]
    if args.list:
        print("\n".join(f"{one.file}: {one.name}" for one in chosen))
        return 0
    os.chdir(ROOT)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        num_missed = run_all(chosen, args.jobs, Path(folder))
    print(f"{len(chosen)} mutants, {num_missed} not caught, {time.monotonic() - begin:.0f} s")
    return 1 if num_missed else 0


def run_all(mutants: Sequence[Mutant], jobs: int, folder: Path) -> int:
    """Runs the tests without a mutant, then with each; prints those that no test catches, and returns their number."""
    for name in PRELOADED:
        importlib.import_module(name)
    tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests if not test.startswith("-")))
    if run_one(None, tests, folder / "unchanged.txt") != SURVIVED:
        print((folder / "unchanged.txt").read_text(encoding="utf-8"))
        raise SystemExit("the tests must pass without a mutant")
    waiting = list(enumerate(mutants))[::-1]
    running: dict[int, tuple[BaseProcess, Mutant, float]] = {}  # with the time of its start
    num_missed = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            number, mutant = waiting.pop()
            process = start(mutant, mutant.tests, folder / f"{number}.txt")
            running[number] = (process, mutant, time.monotonic())
        wait([process.sentinel for process, _, _ in running.values()], timeout=1.0)
        for number, (process, mutant, begin) in list(running.items()):
            seconds = time.monotonic() - begin
            is_late = process.is_alive() and seconds > TIMEOUT_S
            if process.is_alive() and not is_late:
                continue
            process.kill()
            process.join()
            del running[number]
            if seconds > SLOW_S:
                print(f"{mutant.file}: {mutant.name}: {seconds:.0f} s", file=sys.stderr)
            if not is_late and process.exitcode not in (FAILED, -signal.SIGXCPU):
                num_missed += 1
                why = "survives" if process.exitcode == SURVIVED else f"pytest ended with {process.exitcode}"
                print(f"{mutant.file}: {mutant.name}: {why}; tests: {' '.join(mutant.tests)}", flush=True)
    return num_missed


def run_one(mutant: Mutant | None, tests: Sequence[str], log: Path) -> int | None:
    """Pytest's exit status for the tests."""
    process = start(mutant, tests, log)
    process.join()
    return process.exitcode


def start(mutant: Mutant | None, tests: Sequence[str], log: Path) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=play, args=(mutant, tests, log))
    process.start()
    return process


def play(mutant: Mutant | None, tests: Sequence[str], log: Path) -> None:
    """Runs the tests in this process, with its output in the log, and exits with pytest's status."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if mutant is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 5))
        plant(mutant)
    options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header"]
    status = pytest.main([*options, *tests])
    # A module that fails to import is a caught mutant too; pytest reports it as an interruption.
    is_import = status == pytest.ExitCode.INTERRUPTED and re.search(r"error(s)? during collection", log.read_text())
    sys.stdout.flush()
    os._exit(FAILED if is_import else int(status))


def plant(mutant: Mutant) -> None:
    """Lets this process import the changed text of the mutant's module."""
    original, path, source = SourceFileLoader.get_code, mutant.path.resolve(), mutant.source()

    def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
        if Path(self.path).resolve() != path:
            return original(self, fullname)
        return compile(source, self.path, "exec", dont_inherit=True)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
