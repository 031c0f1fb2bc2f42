"""GEMMs on weights of integer codes and activations of 8 bits: the bits of the op in the specs, and its error bound."""

import platform
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import FreshLibrary, library, needs_compiler
from test_coded_gemm import ROUNDING, SHAPES, linear, one_kernel, random_weight
from torch import Tensor

from sageLLM.generated.kernels import cpu
from sageLLM.generated.kernels.reference import KERNELS as REFERENCES
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.coded import FORMS as ALL_FORMS
from sageLLM.runtime.kernels.cpu.coded import CodedWeight, decoded, pack_codes, words_of
from sageLLM.runtime.kernels.cpu.packing import PackedWeight
from sageLLM.runtime.kernels.int8_activations import GROUP, rounded, with_int8_activations

pytestmark = needs_compiler
QUANTISE = REFERENCES["int8_activations"]
MACHINES = ["avx512", "float32", *(["avx2", "plain"] if platform.machine() == "x86_64" else [])]
FLAGS = {"avx2": ("-march=x86-64-v3",), "plain": ("-march=x86-64",)}
ALL = {"int8": torch.bfloat16, "int6": torch.float32}
"""Forms and element types of every machine, each of which is compiled; this one has one more."""
FORMS = ALL | {"int4": torch.float16}
CASES = [(machine, form) for machine in MACHINES for form in (FORMS if machine == "avx512" else ALL)]


def with_int8(weight: CodedWeight) -> CodedWeight:
    return replace(weight, activations="int8")


@lru_cache
def machine(name: str) -> FreshLibrary:
    """The kernel `linear` for an instruction set; a library selects its microkernel when it is loaded, here."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("SAGELLM_CPU_ISA", "fp32" if name == "float32" else "")
        found = one_kernel(Path(folder), FLAGS.get(name, ()))
        for _, form in (case for case in CASES if case[0] == name):
            weight = pack_codes(with_int8(random_weight(form, 1, 1, 1, "", FORMS[form])), 1)
            linear(found, torch.ones(1, 1, dtype=FORMS[form]), weight)
        return found


def some_rows(rows: int, inner: int, dtype: torch.dtype, seed: int) -> Tensor:
    """With a row of many magnitudes, one with outliers, and one of zeros."""
    x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(seed))
    x[1 % rows] *= torch.logspace(-3, 3, inner)
    x[2 % rows, ::GROUP] *= 2000
    x[3 % rows] = 0
    return x.to(dtype)


def float_error(weight: CodedWeight, x: Tensor, exact: Tensor) -> Tensor:
    """The error of sums in float32 and of one rounding to the element type."""
    codes = weight if weight.zeros is None or weight.minima is not None else replace(weight, zeros=None)
    size = decoded(weight, torch.float64).abs() + 2 * decoded(codes, torch.float64).abs()
    if weight.minima is not None and weight.zeros is not None and weight.factors is not None:
        size = size + 2 * decoded(replace(weight, zeros=weight.zeros * 0), torch.float64).abs()
    sums = x.double().abs() @ size.T
    return ROUNDING[x.dtype] * (exact.abs() + torch.finfo(x.dtype).smallest_normal) + 1e-6 * sums + 1e-30


def scales_of(x: Tensor) -> Tensor:
    """The scale of each activation [..., K], in float64."""
    inner = x.shape[-1]
    groups = torch.nn.functional.pad(x, (0, -inner % GROUP)).unflatten(-1, (-1, GROUP))
    return QUANTISE(groups)[1].double().repeat_interleave(GROUP, -1)[..., :inner]


@pytest.mark.parametrize("form", FORMS)
def test_every_machine_computes_the_products_of_the_rounded_activations(form: str) -> None:
    """With equal bits where multiply-adds round once; a row depends on nothing but the row."""
    dtype = FORMS[form]
    for features, inner, group, kind in SHAPES:
        weight = with_int8(random_weight(form, features, inner, group, kind, dtype))
        packed, values = pack_codes(weight, 1), decoded(weight, torch.float64)
        x = some_rows(70, inner, dtype, features)
        exact = rounded(x, QUANTISE).double() @ values.T
        found = {name: linear(machine(name), x, packed) for name, own in CASES if own == form}
        for name, y in found.items():
            assert ((y.double() - exact).abs() <= float_error(weight, x, exact)).all(), (name, kind)
            assert name == "plain" or torch.equal(y, found["avx512"]), (name, kind)
        for rows in (1, 2, 3, 4, 5, 17, 66):
            assert torch.equal(linear(machine("avx512"), x[:rows], packed), found["avx512"][:rows]), (kind, rows)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(CASES),
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(1, 300),
    st.sampled_from([16, 32, 64, 96, 160, 1000]),
    st.sampled_from(["", "zeros"]),
    st.integers(0, 2**16),
)
def test_the_error_is_at_most_half_a_scale_per_input(
    case: tuple[str, str], rows: int, features: int, inner: int, group: int, kind: str, seed: int
) -> None:
    """|y - x w| <= sum over the inputs of |w| * scale / 2, and the roundings of float sums."""
    name, form = case
    weight = with_int8(random_weight(form, features, inner, min(group, inner), kind, FORMS[form]))
    values = decoded(weight, torch.float64)
    x = some_rows(rows, inner, FORMS[form], seed)
    exact = x.double() @ values.T
    bound = (scales_of(x) * (0.5 + 2.0**-14)) @ values.abs().T
    bound += float_error(weight, x, exact) + ROUNDING[x.dtype] * bound
    y = linear(machine(name), x, pack_codes(weight, 1)).double()
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", MACHINES)
def test_codes_and_scales_are_those_of_the_op(name: str) -> None:
    """By the weight 1, which returns the activations that the codes stand for; subnormal and huge ones, too."""
    inner = 70
    codes = torch.full((inner, inner), ALL_FORMS["int6"].center)
    codes.fill_diagonal_(ALL_FORMS["int6"].center + 1)
    words, scales = words_of(codes, ALL_FORMS["int6"]), torch.ones(inner, 1)
    weight = CodedWeight("int6", torch.Size((inner, inner)), inner, words, scales, dtype=torch.float32)
    x = torch.randn(200, inner, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-44, 37, 200)[:, None]
    x[:50] = (x[:50] / x[:50].abs().amax(-1, keepdim=True) * 254).round() / 2  # codes with ties
    assert torch.equal(linear(machine(name), x, pack_codes(with_int8(weight), 1)), rounded(x, QUANTISE))


@pytest.mark.parametrize("name", MACHINES)
def test_a_row_that_is_not_finite_stays_so(name: str) -> None:
    packed = pack_codes(with_int8(random_weight("int8", 20, 70, 70, "", torch.bfloat16)), 1)
    x = torch.ones(4, 70, dtype=torch.bfloat16)
    x[0, 3], x[2, 69], x[3, 40] = torch.inf, torch.nan, -torch.inf
    found = linear(machine(name), x, packed)
    assert found[[0, 2, 3]].isnan().all() and found[1].isfinite().all()


def call(op: str, weight: CodedWeight, gates: int, *operands: Tensor | None) -> tuple[Tensor, Tensor]:
    """The results of the native kernel and of the reference; the weight is the operand that is a PackedWeight."""
    kernel = cpu.KERNELS[op]
    place = list(kernel.op.input_types).index(next(iter(kernel.packed)))
    native = NativeCallable(kernel, library(), REFERENCES[op])
    packed: PackedWeight = pack_codes(weight, gates)
    values = with_int8_activations(decoded(weight, weight.dtype), QUANTISE)
    before, after = operands[:place], operands[place:]
    return native(*before, packed, *after), REFERENCES[op](*before, values, *after)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 2, 20])
def test_fused_ops_have_the_results_of_their_references(form: str, rows: int) -> None:
    """Gated products, epilogues, a norm as the prologue, experts and the head."""
    dtype = torch.float32
    x = some_rows(rows, 96, dtype, 3)
    gated = with_int8(random_weight(form, 2 * 40, 96, 32, "zeros", dtype))
    plain = with_int8(random_weight(form, 40, 96, 96, "", dtype))
    one = with_int8(random_weight(form, 4 * 40, 96, 32, "", dtype))
    experts = replace(one.with_parts(lambda part: part.unflatten(0, (4, 40))), shape=torch.Size((4, 40, 96)))
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(rows)]).to(torch.int32)
    bias, residual = torch.randn(40), torch.randn(rows, 40)
    pairs = {
        "linear": call("linear", plain, 1, x, bias),
        "linear_silu_mul": call("linear_silu_mul", gated, 2, x),
        "linear_add": call("linear_add", plain, 1, x, residual.clone(), bias),
        "rms_norm_linear": call("rms_norm_linear", plain, 1, x, torch.randn(96)),
        "expert_linear": call("expert_linear", experts, 1, x, chosen),
    }
    for op, (found, expected) in pairs.items():
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), op
    (logits, tokens), (expected, expected_tokens) = call("lm_head_sample", plain, 1, x)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(tokens, expected_tokens)
