"""Shared helpers of the tests of native kernels: the callables of one library, and distances in ulps."""

import ctypes
import platform
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.library import Library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW = ("-march=x86-64-v3",) if platform.machine() == "x86_64" else ()
"""As on a machine with registers of 8 floats."""
needs_compiler = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")


@lru_cache(maxsize=1)
def library() -> Library:
    found = compiler.find_compiler()
    assert found is not None, "the tests that call this are skipped without a compiler"
    return Library(cpu.KERNELS, Path(cpu.__file__).parent, found)


class FreshLibrary(Library):
    """Loads a copy of each library, which selects its instruction set again."""

    def __init__(self, folder: Path, flags: tuple[str, ...] = (), sources: Path = Path(cpu.__file__).parent) -> None:
        found = compiler.find_compiler()
        assert found is not None, "tests are skipped without a compiler"
        super().__init__(cpu.KERNELS, sources, found, flags)
        self._copies = folder

    def _load(self, path: Path) -> ctypes.CDLL:
        return super()._load(Path(shutil.copy(path, self._copies)))


@lru_cache(maxsize=256)
def native(op: str) -> NativeCallable:
    return NativeCallable(cpu.KERNELS[op], library(), reference.KERNELS[op])


def assert_near(result: Tensor, narrow: Tensor, exact: Tensor, ulps: int = 1) -> None:
    """float32 within 1e-5 of the float64 oracle; narrow types within `ulps` of the reference, which rounds alike.

    A sum that comes out near 0 may be more ulps off, by the bound on float32: 1e-5 of the largest value.
    """
    if not result.is_floating_point():
        assert torch.equal(result, narrow)
        return
    if result.dtype == torch.float32:
        finite = exact[exact.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)
        return
    assert torch.equal(result.isnan(), narrow.isnan())
    distance = (_ordered(result) - _ordered(narrow)).abs().masked_fill(result.isnan(), 0)
    largest = narrow[narrow.isfinite()].abs().float()
    is_tiny = (result.float() - narrow.float()).abs() <= 1e-5 * (float(largest.max()) if largest.numel() else 0.0)
    far = distance.masked_fill(is_tiny, 0)
    assert not far.numel() or int(far.max()) <= ulps, f"{int(far.max())} ulps apart"


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the floats, adjacent floats one apart."""
    bits = x.view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def spread(x: Tensor) -> Tensor:
    """The same values in rows with gaps, which hold NaN."""
    if not x.is_floating_point() or x.dim() < 2:
        return x
    shape = (*x.shape[:-2], 2 * x.shape[-2] + 1, x.shape[-1] + 3)
    wide = torch.full(shape, torch.nan, dtype=x.dtype)
    part = wide[..., 1::2, 2 : 2 + x.shape[-1]] if x.dim() == 2 else wide[..., : x.shape[-2], 2 : 2 + x.shape[-1]]
    part.copy_(x)
    return part
