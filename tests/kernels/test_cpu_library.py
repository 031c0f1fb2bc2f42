"""Loader of native kernels: one op from its spec entry to torch, compiled once."""

import ctypes
from pathlib import Path

import pytest
import torch

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu import compiler
from sageLLM.runtime.kernels.cpu.build import build
from sageLLM.runtime.kernels.cpu.callables import NativeCallable, row_strides
from sageLLM.runtime.kernels.cpu.library import KernelError, Library
from sageLLM.runtime.kernels.cpu.native import NativeRunner

SOURCES = Path(cpu.__file__).parent
found = compiler.find_compiler()
needs_compiler = pytest.mark.skipif(found is None, reason="no C++ compiler")


def rms_norm() -> NativeCallable:
    assert found is not None, "the tests that call this are skipped without a compiler"
    library = Library(cpu.KERNELS, SOURCES, found)
    return NativeCallable(cpu.KERNELS["rms_norm"], library, reference.KERNELS["rms_norm"])


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 17, 100), (3, 1024), (0, 8)])
def test_a_kernel_from_spec_to_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    for weight in (w, None):
        exact = reference.KERNELS["rms_norm"](x.double(), None if weight is None else weight.double(), eps=1e-5)
        assert isinstance(exact, torch.Tensor)
        result = rms_norm()(x, weight, eps=1e-5)
        bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(result.double(), exact, rtol=bound, atol=bound)


@needs_compiler
def test_strided_rows_are_read_in_place_and_strided_elements_copied() -> None:
    kernel, wide = rms_norm(), torch.randn(6, 40)
    for x in (wide[::2, 4:36], wide.t(), wide[:, ::2]):
        torch.testing.assert_close(kernel(x), reference.KERNELS["rms_norm"](x))


@needs_compiler
def test_other_element_types_go_to_the_reference() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(rms_norm()(x), reference.KERNELS["rms_norm"](x))


@needs_compiler
def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "one.cpp"
    source.write_text(
        '#include "sage.h"\nusing namespace sage;\nSAGE_KERNEL(one) { *(SAGE_ELEMENT*)tensors[0] = {1}; }\n'
    )
    assert found is not None
    first = build(source, "f32", found)
    stamp = first.stat().st_mtime_ns
    assert build(source, "f32", found) == first and first.stat().st_mtime_ns == stamp
    assert build(source, "bf16", found) != first
    source.write_text(source.read_text().replace("{1}", "{2}"))
    assert build(source, "f32", found) != first


FAILING = """#include "sage.h"
using namespace sage;
SAGE_KERNEL(huge) {
    parallel_for(sizes[0], [&](int64_t part) { scratch<char>(Scratch::PREPARED_ROWS, part % 2 ? 64 : sizes[1]); });
}
"""


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("parts", [1, 10])
def test_a_kernel_that_fails_raises(tmp_path: Path, num_threads: int, parts: int) -> None:
    """An allocation that fails, in the caller or in a part of a parallel loop; the next call works."""
    assert found is not None
    source = tmp_path / "huge.cpp"
    source.write_text(FAILING)
    kernels = Library({}, tmp_path, found)
    huge, before = kernels.helper(str(source), "huge", "f32"), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        kernels.set_num_threads()
        for _ in range(3):
            with pytest.raises(KernelError, match=r"^huge: cannot allocate \d{19} bytes of scratch memory$"):
                huge(None, (ctypes.c_int64 * 2)(parts, 2**60), None)
            assert huge(None, (ctypes.c_int64 * 2)(parts, 1000), None) is None
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_a_failing_call_ends_the_step() -> None:
    """The error of a kernel in a list of calls becomes an exception of the runner."""
    assert found is not None
    runner = NativeRunner([Library(cpu.KERNELS, SOURCES, found)], found)
    calls = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    def record(*arguments: int) -> int | None:
        calls.append(arguments)
        return ctypes.addressof(message) if len(calls) == 2 else None

    message = ctypes.create_string_buffer(b"second: broken")
    address = ctypes.cast(record, ctypes.c_void_p).value or 0
    table = (ctypes.c_int64 * 24)(*[address, 0, 0, 0, 0, 0, 0, 0] * 3)
    with pytest.raises(KernelError, match=r"^second: broken$"):
        runner.run(ctypes.addressof(table), 0, 3, 1)
    assert len(calls) == 2


@needs_compiler
def test_errors_of_the_compiler_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path))
    source = tmp_path / "bad.cpp"
    source.write_text("int answer = ;\n")
    assert found is not None
    with pytest.raises(compiler.CompileError, match=r"could not build bad\.cpp:\n.*expected"):
        build(source, "f32", found)
    assert not list((tmp_path / "kernels").glob("*.so"))


@pytest.mark.parametrize(
    ("shape", "strides", "rows"),
    [
        ((2, 3, 4), (12, 4, 1), [4]),
        ((2, 3, 4), (24, 8, 1), [8]),
        ((1, 3, 4), (99, 8, 1), [8]),
        ((2, 3, 4), (13, 4, 1), None),
        ((2, 4), (1, 2), None),
        ((4,), (1,), [0]),
    ],
)
def test_leading_dims_become_rows_if_one_stride_describes_them(
    shape: tuple[int, ...], strides: tuple[int, ...], rows: list[int] | None
) -> None:
    pattern = cpu.KERNELS["rms_norm"].op.input_types["x"]
    assert row_strides(pattern, shape, strides) == rows
