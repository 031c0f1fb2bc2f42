"""Compares the kernels of a plugin with their references, as the generated tests of the plugin do.

Triton kernels run in Triton's interpreter, in a process of its own, because TRITON_INTERPRET must be set before the
import of Triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sageLLM.generated.tests.op_checks import make_operands, run
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.registry.plugins import Registry, load_registry
from sageLLM.runtime.registry.trees import native_tables, triton_table

Kernel = Callable[..., Any]
Check = Mapping[str, Any]
"""An op with its cases, attrs and the dims that bound its index operands, as in a generated test."""
BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
"""Allowed error relative to the largest value: four units in the last place of narrow types."""


def why_not_checked(target: str) -> str | None:
    """The reason why kernels of the target cannot run here."""
    if target == "cpu":
        return None if find_compiler() is not None else "no C++ compiler"
    return None if find_spec("triton") is not None else "Triton is not installed"


def problems_of_kernels(target: str, tree: Path, checks: Sequence[Check]) -> list[str]:
    """The differences between the kernels of a generated tree and their references, one line each."""
    if target == "cpu":
        registry = load_registry([tree])
        return list(_problems(registry, _native(registry), checks))
    environ = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, data = [sys.executable, "-m", __name__], json.dumps([str(tree), checks])
    done = subprocess.run(command, input=data, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        return [f"the checks of Triton kernels failed:\n{done.stderr[-2000:]}"]
    problems: list[str] = json.loads(done.stdout.splitlines()[-1])
    return problems


def _native(registry: Registry) -> Mapping[str, Kernel]:
    """The native kernels of the plugin, the last tree of the registry."""
    folder, kernels = native_tables(registry.packages)[-1]
    library = Library(kernels, folder, find_compiler())
    return {name: NativeCallable(kernel, library, registry.kernels[name]) for name, kernel in kernels.items()}


def _problems(registry: Registry, kernels: Mapping[str, Kernel], checks: Sequence[Check]) -> Iterator[str]:
    for check in checks:
        op, kernel = registry.ops[check["op"]], kernels.get(check["op"])
        if kernel is None:  # the op runs its reference on this target
            continue
        for case in check["cases"]:
            for dtype in _dtypes(op):
                for problem in _differences(op, kernel, registry.kernels[op.op], check, case, dtype):
                    yield f"{op.op} {case} {str(dtype).removeprefix('torch.')}: {problem}"


def _dtypes(op: type[OpNode]) -> list[torch.dtype]:
    has_variable = any(pattern.is_variable for pattern in op.input_types.values())
    return list(BOUNDS) if has_variable else [torch.float32]


def _differences(
    op: type[OpNode], kernel: Kernel, reference: Kernel, check: Check, case: Check, dtype: torch.dtype
) -> Iterator[str]:
    """With all optional operands, and without them, if there are any."""
    everything = make_operands(op, case, check["limits"], dtype)
    required = {name: x for name, x in everything.items() if name not in op.optional_inputs}
    for operands in [everything, *([required] if len(required) < len(everything) else [])]:
        missing = "" if operands is everything else " without optional operands"
        try:
            found = run(op, kernel, operands, case, check["attrs"])
        except Exception as error:  # a kernel may raise anything, and a test reports all kernels
            yield f"raises {type(error).__name__}{missing}: {str(error)[:500]}"
            continue
        expected = run(op, reference, _widened(operands, dtype), case, check["attrs"])
        for name, one, other in zip(op.output_types, found, expected, strict=True):
            if problem := _difference(one, other):
                yield f"{name} {problem}{missing}"


def _widened(operands: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """float64 operands for the oracle of float32; a narrow type rounds as its reference does."""
    if dtype != torch.float32:
        return dict(operands)
    return {name: x.double() if x.is_floating_point() else x for name, x in operands.items()}


def _difference(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"has the shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not found.is_floating_point() or not found.numel():
        return None if torch.equal(found, expected.to(found.dtype)) else "has other values than the reference"
    error = float((found.double() - expected.double()).abs().nan_to_num(torch.inf).max())
    bound = BOUNDS[found.dtype] * max(1.0, float(expected.double().abs().max()))
    return None if error <= bound else f"differs by {error:.2g}, expected at most {bound:.2g}"


def _main() -> None:
    """Checks the Triton kernels named on stdin and prints the problems as JSON."""
    from sageLLM.runtime.kernels.triton_interpreter import patch_interpreter

    tree, checks = json.load(sys.stdin)
    patch_interpreter()
    registry = load_registry([tree])
    table = triton_table(registry.packages)
    print(json.dumps(list(_problems(registry, table, checks))))


if __name__ == "__main__":
    _main()
