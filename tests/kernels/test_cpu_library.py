"""Loader of native kernels: one op from its spec entry to torch, compiled once."""

import ctypes
import threading
from pathlib import Path

import pytest
import torch

from sageLLM.generated.kernels import cpu, reference
from sageLLM.runtime.kernels.cpu import build_jobs, compiler
from sageLLM.runtime.kernels.cpu.build import Target, build, built, load
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


TWO = """#include "sage.h"
using namespace sage;
SAGE_KERNEL(one) { *(float*)tensors[0] = 1; }

SAGE_KERNEL(one_more) { *(float*)tensors[0] = 2; }

SAGE_KERNEL(third) { *(float*)tensors[0] = 3; }
"""


@needs_compiler
def test_a_library_may_have_some_kernels_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that begins or ends another one is not taken for it; one library serves all who need less."""
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path / "cache"))
    source = tmp_path / "two.cpp"
    source.write_text(TWO)
    target = Target(source, "f32")
    some = build(source, "f32", found, kernels=["one_more", "third"])
    assert target.kernels_of(some) == ["one_more", "third"]
    assert [results(some, name) for name in target.kernels] == [
        b"one: not compiled into this library", 2.0, 3.0
    ]  # fmt: skip
    assert built(target, found, ["third"]) == built(target, None, ["third"]) == some
    assert built(target, found, ["one"]) is built(target, found) is None
    whole = build(source, "f32", found)
    assert [results(whole, name) for name in target.kernels] == [1.0, 2.0, 3.0]
    assert built(target, found, ["one"]) == whole


def results(library: Path, name: str) -> float | bytes:
    """What a kernel writes, or its error."""
    function, value = load(library)[f"sage_{name}"], ctypes.c_float(0)
    function.restype = ctypes.c_char_p
    message: bytes | None = function((ctypes.c_void_p * 1)(ctypes.addressof(value)), None, None)
    return value.value if message is None else message


@needs_compiler
def test_only_the_kernels_that_are_needed_and_missing_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two models; a kernel that was not prepared comes with all others of its file."""
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path))
    library = Library(cpu.KERNELS, SOURCES, found)
    library.prepare(["rms_norm", "layer_norm", "rms_norm"], "f32")
    library.prepare(["rms_norm", "rms_norm_1p", "split_qkv"], "f32")
    target = Target(SOURCES / "norm.cpp", "f32")
    in_files = sorted(target.kernels_of(path) for path in (tmp_path / "kernels").glob("*.so"))
    assert in_files == [["rms_norm", "layer_norm"], ["rms_norm_1p"]]
    assert library.jobs(["rms_norm_1p", "layer_norm"], "f32") == []
    assert library.address("rms_norm", "f32") and built(target, found) is None
    assert library.address("head_layer_norm", "f32") and built(target, found) is not None


@needs_compiler
def test_files_are_built_two_at_a_time_and_large_ones_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build_jobs.os, "cpu_count", lambda: 2)
    order: list[tuple[str, int]] = []
    meeting = threading.Barrier(2, timeout=60)

    def record(source: Path, element: str, compiler: object, flags: tuple[str, ...], *_: object) -> Path:
        meeting.wait()
        order.append((source.stem, len(flags)))
        return source

    monkeypatch.setattr(build_jobs, "build", record)
    library = Library(cpu.KERNELS, SOURCES, found)
    jobs = library.jobs(["rms_norm", "linear", "paged_decode_attention"], "bf16")
    build_jobs.build_all([*jobs, *library.jobs(["linear"], "bf16", "int4")], found)
    assert ("linear", 1) in order[:2] and ("norm", 0) in order[2:] and len(order) == 4
