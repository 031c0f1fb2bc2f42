"""Forms of ops in `forms/`: integers, conditions, views, scans, selections. Each has kernels on every target, which are
compared with the reference in float64 or in exact integers: odd sizes, gaps between rows, no rows, special values.
"""

import importlib
import sys
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from native import needs_compiler
from overlays import run_tree

from sageLLM.codegen import driver
from sageLLM.codegen.emit.gaps import kernel_gaps
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.render import Renderer
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.library import Library

FORMS = Path(__file__).with_name("forms")
PATHS = sorted((FORMS / "ops").glob("*.yaml"))
LEAST, GREATEST = -(2**31), 2**31 - 1


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms") / "forms_tree"
    driver.generate_from_scratch([FORMS], folder)
    return folder


@pytest.fixture(scope="module")
def package(tree: Path) -> Iterator[ModuleType]:
    sys.path.insert(0, str(tree.parent))
    yield importlib.import_module(tree.name)
    sys.path.remove(str(tree.parent))


def test_every_form_has_a_kernel_on_every_target(memo: LinkMemo) -> None:
    specs = driver.load_and_link([FORMS], memo=memo)
    forms = [op for ops in specs.own().ops_by_stem.values() for op in ops]
    assert len(forms) >= 42
    assert kernel_gaps(forms, specs, Programs(specs.ops), Renderer()) == []


@needs_compiler
@pytest.mark.timeout(600)  # four C++ files are compiled for two element types
def test_kernels_agree_with_exact_references(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_EXACT", "1")
    runs = run_tree(tree, "7")
    assert [run for run in runs if run["wrong"]] == []
    counts = {target: sum(run["target"] == target for run in runs) for target in ("reference", "cpu", "triton", "long")}
    assert counts["reference"] == counts["cpu"] == counts["triton"] >= 42 and counts["long"] >= 15


# Meaning of scans and selections: NaN, infinities, equal elements, overflow


@pytest.fixture(scope="module", params=["reference", pytest.param("cpu", marks=needs_compiler)])
def kernels(request: pytest.FixtureRequest, package: ModuleType, tree: Path) -> dict[str, Any]:
    references: dict[str, Any] = importlib.import_module(f"{package.__name__}.kernels.reference").KERNELS
    if request.param == "reference":
        return references
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("SAGELLM_KERNEL_FLAGS", "-O1")  # as overlay_runs.py, so that its libraries are reused
    request.addfinalizer(monkeypatch.undo)
    table = importlib.import_module(f"{package.__name__}.kernels.cpu").KERNELS
    library = Library(table, tree / "kernels/cpu", compiler.find_compiler())
    return {name: NativeCallable(one, library, references[name]) for name, one in table.items()}


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_scans_propagate_nan_and_infinities(kernels: dict[str, Any]) -> None:
    x = rows([1, inf, 2, -inf, 3], [2, -1, nan, 4, 5], [-inf, -1, 0, -2, inf])
    sums, products, largest, _ = kernels["scan_all"](x)
    expected = rows([1, inf, inf, nan, nan], [2, 1, nan, nan, nan], [-inf, -inf, -inf, -inf, nan])
    torch.testing.assert_close(sums, expected, equal_nan=True)
    expected = rows([1, inf, inf, -inf, -inf], [2, -2, nan, nan, nan], [-inf, inf, nan, nan, nan])
    torch.testing.assert_close(products, expected, equal_nan=True)
    expected = rows([1, inf, inf, inf, inf], [2, 2, nan, nan, nan], [-inf, -1, 0, 0, inf])
    torch.testing.assert_close(largest, expected, equal_nan=True)


def test_integer_scans_wrap_around(kernels: dict[str, Any]) -> None:
    numbers = [GREATEST, 1, 3, -7, 65536, 65536, LEAST]
    x = torch.tensor([numbers], dtype=torch.int32)
    sums, products, *_ = kernels["scan_of_integers"](x, x.long(), torch.zeros_like(x, dtype=torch.int8))
    total, product, expected = 0, 1, list[tuple[int, int]]()
    for number in numbers:
        total, product = total + number, product * number
        expected.append((wrapped(total), wrapped(product)))
    assert list(zip(sums[0].tolist(), products[0].tolist(), strict=True)) == expected


def wrapped(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize(
    ("row", "values", "indices"),
    [
        ([1, 3, 3, 2], [3, 3, 2], [1, 2, 3]),
        ([0.0, -0.0, 0.0, -1], [0, 0, 0], [0, 1, 2]),
        ([1, nan, inf, nan, 5], [nan, nan, inf], [1, 3, 2]),
        ([-inf, -inf, -inf, -inf], [-inf, -inf, -inf], [0, 1, 2]),
        ([*range(40), 40, 40, *range(20)], [40, 40, 39], [40, 41, 39]),
    ],
    ids=str,
)
def test_the_largest_elements(
    row: list[float], values: list[float], indices: list[int], kernels: dict[str, Any]
) -> None:
    found = kernels["top_of_floats"](rows(row), K=3)
    torch.testing.assert_close(found[0], rows(values), equal_nan=True)
    assert found[1].tolist() == [indices] and found[1].dtype == torch.int32


def test_no_rows_and_no_elements(kernels: dict[str, Any]) -> None:
    found = kernels["top_of_floats"](torch.zeros(0, 5), K=2)
    assert [tuple(x.shape) for x in found] == [(0, 2), (0, 2)]
    found = kernels["top_of_floats"](torch.zeros(3, 0), K=0)
    assert [tuple(x.shape) for x in found] == [(3, 0), (3, 0)]
    assert [tuple(x.shape) for x in kernels["scan_all"](torch.zeros(3, 0))] == [(3, 0)] * 4
    assert kernels["scan_of_floats"](torch.zeros(0, 4)).shape == (0, 4)


def test_division_rounds_down_and_never_ends_the_process(kernels: dict[str, Any]) -> None:
    x = torch.tensor([[7, -7, 7, -7, LEAST]], dtype=torch.int32)
    z = torch.tensor([[2, 2, -2, -2, -1]], dtype=torch.int32)
    q, r = kernels["floor_divide_any"](x[:, :4], z[:, :4])
    assert q.tolist() == [[3, -4, -4, 3]] and r.tolist() == [[1, 1, -1, -1]]
    if isinstance(kernels["floor_divide_any"], NativeCallable):  # torch's own division raises or traps
        q, _ = kernels["floor_divide_any"](x, torch.zeros_like(x))
        assert q.tolist() == [[0] * 5]
        assert kernels["floor_divide_any"](x, z)[0].tolist() == [[3, -4, -4, 3, LEAST]]
