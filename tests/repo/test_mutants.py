"""The mutants of `make mutants` fit the code: each changes one place, and its tests exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

from mutant import ROOT
from run import MUTANTS

# In another process: this one may have imported the module already.
REPORT = """
from pathlib import Path
import run
from mutant import Mutant
run.MAX_CPU_S = 4
file, tests = "runtime/kv/block_pool.py", ("tests/kv/test_manager.py::test_sizes_must_be_positive",)
wrong = Mutant("no check", file, "if num_blocks is not None and num_blocks < 1:", "if False:", tests)
harmless = Mutant("nothing", file, "A pool of `num_blocks` KV blocks", "The pool of `num_blocks` KV blocks", tests)
check = "if num_blocks is not None and num_blocks < 1:"
endless = Mutant("endless", file, check, "if any(iter(int, 1)):", tests)
print(run.run_all([wrong, harmless, endless], 2, Path({folder!r})))
"""


def test_every_mutant_changes_one_place() -> None:
    for mutant in MUTANTS:
        compile(mutant.source(), mutant.file, "exec")
    assert len({(mutant.file, mutant.name) for mutant in MUTANTS}) == len(MUTANTS) >= 60


def test_every_area_has_mutants() -> None:
    areas = {"/".join(mutant.file.split("/")[:2]) for mutant in MUTANTS}
    assert {"runtime/scheduler", "runtime/kv", "runtime/core", "codegen/emit", "codegen/link"} <= areas


def test_the_tests_of_a_mutant_exist() -> None:
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        file, _, function = test.partition("::")
        name, _, case = function.partition("[")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), test
        if file == "tests/codegen/test_cases.py":
            kind = name.removeprefix("test_")
            assert (ROOT / "tests/codegen/cases" / kind / case.rstrip("]")).is_dir(), test


def test_a_mutant_that_no_test_catches_is_reported(tmp_path: Path) -> None:
    """One that makes the tests run without end is caught."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", REPORT.format(folder=str(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "runtime/kv/block_pool.py: nothing: survives; tests: tests/kv/test_manager.py::test_sizes_must_be_positive",
        "1",
    ]
