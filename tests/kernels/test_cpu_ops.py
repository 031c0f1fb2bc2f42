"""Every generated CPU kernel against the reference: sizes, element types, layouts, absent operands, special values."""

import ctypes
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import pytest
import torch
from native import DTYPES, assert_near, native, needs_compiler, spread
from torch import Tensor

from sageLLM.generated.kernels import cpu, reference
from sageLLM.generated.ops import OPS
from sageLLM.generated.tests.op_checks import make_operands
from sageLLM.runtime.core.errors import TypeMismatch
from sageLLM.runtime.core.ir.op_node import REQUIRED, AttrSpec, OpNode
from sageLLM.runtime.core.ir.types import TensorType

SIZES = (1, 2, 3, 5, 16, 17, 33, 64, 130)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3e38, -3e38, 65504.0, 88.8, -104.0, 6e-8)
INDEXED = {"ids": ("V",), "pos": ("P",), "rows": ("T",), "q_start": (), "slots": ()}
BATCHED = {"q_start", "block_table"}  # operands that depend on each other: see test_cpu_attention.py
SEPARATE = {
    "sample",
    "all_gather",
    "send",
}  # tested below, and in test_cpu_communicator.py and test_cpu_point_to_point.py
COMPUTED = [
    name
    for name, kernel in cpu.KERNELS.items()
    if name not in SEPARATE and not kernel.updates and not kernel.packed and not BATCHED & set(kernel.op.input_types)
]

pytestmark = needs_compiler


def dim_names(cls: type[OpNode]) -> list[str]:
    return list(cpu.KERNELS[cls.op].sizes)


def cases(name: str) -> Iterator[dict[str, Any]]:
    """Random sizes that the op's conditions allow, then zero rows."""
    cls, random, found = OPS[name], Random(name), 0
    while found < 6:
        case: dict[str, Any] = {dim: random.choice(SIZES) for dim in dim_names(cls)}
        case |= {dim: min(size, 5) for dim, size in case.items() if dim in ("R", "T", "N", "A", "Nq", "Nkv")}
        case |= {"Dr": case["Dr"] // 2 * 2} if "Dr" in case else {}
        if is_possible(cls, case):
            found += 1
            yield case
            if found == 6 and "P" not in case:
                yield case | {dim: 0 for dim in ("R", "T", "S") if dim in case and name != "select_rows"}


def is_possible(cls: type[OpNode], case: Mapping[str, Any]) -> bool:
    attrs = attrs_of(cls, case)
    try:
        operands = operands_of(cls, case, torch.float32)
        cls.resolve({name: type_of(x) for name, x in operands.items()}, attrs)
    except TypeMismatch:
        return False
    return all(size > 0 for size in case.values())


def type_of(x: Tensor) -> TensorType:
    return TensorType("f32" if x.is_floating_point() else "i32", tuple(x.shape))


def attrs_of(cls: type[OpNode], case: Mapping[str, Any]) -> dict[str, Any]:
    """The dims of the case, and a value for each required attr."""
    attrs = {name: case[name] for name, spec in cls.attr_types.items() if spec.type == "dim"}
    missing = {name: spec for name, spec in cls.attr_types.items() if spec.default is REQUIRED and name not in attrs}
    return attrs | {name: some_value(spec) for name, spec in missing.items()}


def some_value(spec: AttrSpec) -> Any:
    if spec.choices:
        return spec.choices[0]
    least = spec.min or 0
    return {"f32": least + 0.7, "i32": int(least) + 1, "bool": True, "str": "x"}[spec.type]


def operands_of(cls: type[OpNode], case: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    limits = {name: next(iter(INDEXED[name]), "") for name in cls.input_types if name in INDEXED}
    return make_operands(cls, case, limits, dtype)


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def check(name: str, operands: list[Tensor | None], attrs: Mapping[str, Any]) -> None:
    """All three agree: the kernel, the reference in the same types, and in float64."""
    results = as_tuple(native(name)(*copied(operands), **attrs))
    narrow = as_tuple(reference.KERNELS[name](*copied(operands), **attrs))
    exact = as_tuple(reference.KERNELS[name](*map(widen_operand, operands), **attrs))
    for result, rounded, oracle in zip(results, narrow, exact, strict=True):
        assert (result.dtype, result.shape) == (rounded.dtype, rounded.shape)
        assert_near(result, rounded, oracle)


def widen_operand(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def copied(operands: list[Tensor | None]) -> list[Tensor | None]:
    """Copies that keep the strides."""
    return [x if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in operands]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that an element that was not written is detected."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_layouts(name: str, dtype: torch.dtype) -> None:
    for case in cases(name):
        cls = OPS[name]
        operands, attrs = operands_of(cls, case, dtype), attrs_of(cls, case)
        check(name, list(operands.values()), attrs)
        check(name, [spread(x) for x in operands.values()], attrs)
        optional = [n for n in cls.input_types if n in cls.optional_inputs]
        for absent in optional:
            check(name, [None if n == absent else x for n, x in operands.items()], attrs)


@pytest.mark.parametrize("name", COMPUTED)
def test_special_values(name: str) -> None:
    """The kernel returns infinities and NaN for the same elements as the reference."""
    case = next(cases(name))
    cls, random = OPS[name], Random(name)
    operands = operands_of(cls, case, torch.float32)
    for x in operands.values():
        if x.is_floating_point():
            for i in range(0, x.numel(), 3):
                x.view(-1)[i] = random.choice(SPECIAL)
    results = as_tuple(native(name)(*operands.values(), **attrs_of(cls, case)))
    expected = as_tuple(reference.KERNELS[name](*operands.values(), **attrs_of(cls, case)))
    for result, oracle in zip(results, expected, strict=True):
        torch.testing.assert_close(result, oracle, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in COMPUTED if OPS[name].inplace])
def test_outputs_may_reuse_the_memory_of_inputs(name: str) -> None:
    """The same pointer as input and output, as the native executor passes it."""
    cls, case = OPS[name], next(cases(name))
    operands, attrs = operands_of(cls, case, torch.bfloat16), attrs_of(cls, case)
    expected = as_tuple(native(name)(*operands.values(), **attrs))
    kernel = native(name)
    [(output, source)] = cls.inplace.items()
    position, original = list(cls.output_types).index(output), operands[source].clone()
    results = run_inplace(kernel, list(operands.values()), attrs, list(cls.input_types).index(source), position)
    for result, oracle in zip(results, expected, strict=True):
        assert torch.equal(result, oracle)
    assert not torch.equal(operands[source], original)


def run_inplace(
    kernel: Any, operands: list[Tensor], attrs: Mapping[str, Any], source: int, position: int
) -> list[Tensor]:
    signature = kernel._prepared(tuple(operands), attrs)
    outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in signature.outputs]
    outputs[position] = operands[source]
    pointers = [x.data_ptr() for x in (*operands, *outputs)]
    signature.function((ctypes.c_void_p * len(pointers))(*pointers), signature.sizes, signature.attrs)
    return outputs


def test_bf16_results_are_rounded_to_the_nearest_even_number() -> None:
    """Sums of numbers of all exponents as in torch, bit for bit; a subnormal result may be 0."""
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**15), 2**15, (2, 200, 130), generator=generator).to(torch.int16)
    a, b = bits.view(torch.bfloat16)
    result, expected = native("add")(a, b), a + b
    is_subnormal = (expected != 0) & (expected.abs() < torch.finfo(torch.bfloat16).tiny)
    is_same = (result.view(torch.int16) == expected.view(torch.int16)) | (result.isnan() & expected.isnan())
    assert bool((is_same | (is_subnormal & (result == 0))).all())
    assert int((result == 0).sum()) < result.numel() // 100


def test_greedy_tokens_are_the_first_of_the_most_probable() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [float("nan"), 9.0, 1.0, 1.0], [-1.0, -2.0, -float("inf"), -1.0]])
    assert native("sample")(logits).tolist() == [1, 0, 0] == reference.KERNELS["sample"](logits).tolist()


@pytest.mark.parametrize("filters", [(), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")], ids=str)
def test_drawn_tokens(filters: tuple[str, ...]) -> None:
    """The same tokens as the reference in 200 varied rows; a draw on the border of two tokens may choose either."""
    generator = torch.Generator().manual_seed(len(filters))
    rows, tokens = 200, 37
    uniform = [torch.rand(rows, generator=generator) for _ in range(4)]
    logits = 3 * torch.randn(rows, tokens, generator=generator)
    given = {
        "temperature": torch.where(uniform[0] < 0.1, 0.0, 2 * uniform[0]),
        "top_k": torch.randint(0, 9, (rows,), generator=generator).to(torch.int32),
        "top_p": uniform[1],
        "min_p": uniform[2] / 4,
        "noise": uniform[3],
    }
    operands = [given[name] if name in ("temperature", "noise", *filters) else None for name in given]
    results = [kernel(logits, *operands) for kernel in (native("sample"), reference.KERNELS["sample"])]
    assert int((results[0] != results[1]).sum()) <= 1
