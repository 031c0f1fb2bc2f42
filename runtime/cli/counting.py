"""Counts of rewrites for `sagellm generate`, which compares them with what the specs expect.

Counting runs generated code in a process of its own, in which the new tree stands in for `sageLLM.generated`. So the
installed tree may be missing or damaged: `sagellm generate` creates it from the specs alone.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GENERATED = "sageLLM.generated"


@dataclass(frozen=True, slots=True)
class Missed:
    """See `sageLLM.runtime.inspect.expectations.MissedExpectation`, which only the counting process imports."""

    pass_name: str
    model: str
    stage: str
    fired: int
    expected: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unbuilt:
    """See `UnbuiltModel` there."""

    model: str
    stage: str | None
    error: str


def missed_expectations(tree: Path, is_overlay: bool) -> list[Missed | Unbuilt]:
    """The expectations that the passes of a new tree miss, and its models that cannot be built from `tests.tiny`.

    An overlay runs together with the installed tree.

    If the installed tree of an overlay cannot be used, a new one is generated for it in a temporary folder.
    """
    done = _count(tree, None) if is_overlay else _count(tree, tree)
    if done.returncode != 0 and is_overlay:
        with tempfile.TemporaryDirectory(prefix="sagellm-") as folder:
            base = Path(folder, "generated")
            _run("sageLLM.runtime.cli.entry", "generate", "--out", str(base)).check_returncode()
            done = _count(tree, base)
    if done.returncode != 0:
        raise RuntimeError(f"the new code could not be run to count its rewrites:\n{done.stderr}")
    return [_parsed(one) for one in json.loads(done.stdout)]


def _parsed(one: dict[str, Any]) -> Missed | Unbuilt:
    return Unbuilt(**one) if "error" in one else Missed(**one | {"reasons": tuple(one["reasons"])})


def _count(tree: Path, base: Path | None) -> subprocess.CompletedProcess[str]:
    return _run("sageLLM.runtime.cli.counting", str(tree), str(base or ""))


def _run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-B", "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, env=environ)


def _main(tree: str, base: str) -> None:
    """Prints the missed expectations as JSON; an empty `base` is the installed tree."""
    if base:
        _import_as_generated(Path(base))
    from sageLLM.runtime.inspect.expectations import missed_expectations as missed
    from sageLLM.runtime.inspect.expectations import missed_in
    from sageLLM.runtime.registry.plugins import load_registry

    if tree == base:
        registry = load_registry()
        found = missed_in(registry, registry.passes, registry.models)
    else:
        found = missed(Path(tree), is_overlay=True)
    print(json.dumps([asdict(one) for one in found]))


def _import_as_generated(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        GENERATED, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None, "a file location always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[GENERATED] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _main(*sys.argv[1:])
