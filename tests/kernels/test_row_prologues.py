"""Row prologues of GEMMs (`prologues/`): norms, adds and activations in front of a product, computed once per row.

A fused kernel must return the bits of the kernels that it replaces, and agree with the references in float64.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from native import DTYPES, native, needs_compiler, spread
from torch import Tensor

from sageLLM.codegen import driver
from sageLLM.codegen.kernel.gemm import gemm_of
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.specs import Specs
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.library import Library

FOLDER = Path(__file__).with_name("prologues")
SIZES = [(1, 1, 1), (2, 65, 33), (17, 40, 100)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SHAPES = {
    "norm_linear": "T.K K N.K N",
    "add_norm_linear": "T.K T.K K N.K",
    "add_norm_linear_silu_mul": "T.K T.K K 2N.K 2N",
    "norm_head_sample": "T.K K N.K",
    "add_linear": "T.K T.K N.K",
    "relu_linear_add": "T.K N.K T.N",
    "silu_mul_linear": "T.2K N.K",
    "embed_linear": "T N.K N.K",
    "norm_heads_linear": "T.3.K 3.N.K",
    "second_half_linear": "T.2K N.K",
    "part_linear": "T.2K N.K",
}
FUSED = [name for name in SHAPES if name not in ("second_half_linear", "part_linear")]


@pytest.fixture(scope="module")
def specs(memo: LinkMemo) -> Specs:
    return driver.load_and_link([FOLDER], memo=memo)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    tree = tmp_path_factory.mktemp("prologues") / "prologues_tree"
    driver.generate_from_scratch([FOLDER], tree)
    sys.path.insert(0, str(tree.parent))
    yield importlib.import_module(tree.name)
    sys.path.remove(str(tree.parent))


@pytest.fixture(scope="module")
def references(package: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module(f"{package.__name__}.kernels.reference").KERNELS
    return found


@pytest.fixture(scope="module")
def kernels(package: ModuleType, references: dict[str, Any]) -> dict[str, NativeCallable]:
    module = importlib.import_module(f"{package.__name__}.kernels.cpu")
    library = Library(module.KERNELS, Path(module.__file__ or "").parent, compiler.find_compiler())
    return {name: NativeCallable(one, library, references[name]) for name, one in module.KERNELS.items()}


def operands(op: str, rows: int, inner: int, features: int, dtype: torch.dtype) -> list[Tensor]:
    """Random operands; rows have gaps, which hold NaN."""
    torch.manual_seed(rows)
    sizes = {"T": rows, "K": inner, "2K": 2 * inner, "N": features, "2N": 2 * features, "3": 3}
    shapes = [[sizes[dim] for dim in shape.split(".")] for shape in SHAPES[op].split()]
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    if op == "embed_linear":
        return [torch.randint(features, (rows,), dtype=torch.int32), *made[1:]]
    return [spread(x) if x.dim() == 2 and x.shape[0] == rows else x for x in made]


def results(value: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def run_calls(op: str, inputs: list[Tensor], specs: Specs) -> list[Tensor]:
    """The native kernels of the ops under `fuses`, one after the other."""
    definition = specs.ops[op]
    values: dict[str, Tensor] = dict(zip((o.name for o in definition.inputs), inputs, strict=False))
    for call in definition.fuses:
        found = native(call.op)(*(values.get(arg) if arg else None for arg in call.args))
        values |= dict(zip(call.targets, results(found), strict=True))
    return [values[o.name] for o in definition.outputs]


def test_all_of_them_are_gemms(specs: Specs) -> None:
    programs = Programs(specs.ops)
    found = {name: gemm_of(specs.ops[name], programs) for name in SHAPES if name != "norm_head_sample"}
    assert all(gemm is not None and gemm.prologue is not None for gemm in found.values())
    assert {name for name, gemm in found.items() if gemm and gemm.prologue and not gemm.prologue.in_scratch} == {
        "add_linear"
    }


@needs_compiler
@pytest.mark.timeout(300)  # the first one compiles the kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_with_float64(
    dtype: torch.dtype, kernels: dict[str, NativeCallable], references: dict[str, Any]
) -> None:
    assert kernels.keys() == SHAPES.keys()
    for op, kernel in kernels.items():
        assert kernel.kernel.packed, op
        for size in SIZES:
            inputs = operands(op, *size, dtype)
            exact = results(references[op](*(x.double() if x.is_floating_point() else x for x in inputs)))
            for found, expected in zip(results(kernel(*inputs)), exact, strict=True):
                if found.is_floating_point():
                    tolerance = TOLERANCE[dtype]
                    scale = max(1.0, float(expected.abs().max()))
                    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_return_the_bits_of_the_calls(
    dtype: torch.dtype, kernels: dict[str, NativeCallable], specs: Specs
) -> None:
    for op in FUSED:
        for size in SIZES:
            inputs = operands(op, *size, dtype)
            for found, expected in zip(results(kernels[op](*inputs)), run_calls(op, inputs, specs), strict=True):
                assert torch.equal(found, expected), op


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_of_rows_and_threads_change_nothing(
    threads: int, kernels: dict[str, NativeCallable], specs: Specs
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for op in FUSED:
            inputs = operands(op, 1100, 40, 35, torch.bfloat16)
            for found, expected in zip(results(kernels[op](*inputs)), run_calls(op, inputs, specs), strict=True):
                assert torch.equal(found, expected), op
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_no_rows(kernels: dict[str, NativeCallable]) -> None:
    for op in SHAPES:
        inputs = operands(op, 0, 8, 5, torch.float32)
        assert all(x.shape[0] == 0 for x in results(kernels[op](*inputs)))
