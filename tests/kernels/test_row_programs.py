"""Equations as loops: what is a row, what is swept how often, what is stored when, and why an op is none."""

import pytest

from sageLLM.codegen.driver import load_and_link
from sageLLM.codegen.emit.cpp_arguments import stride_names
from sageLLM.codegen.expr.size import Size, formula
from sageLLM.codegen.expr.tree import Number, Ref
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.kernel.check import check_inplace
from sageLLM.codegen.kernel.indexing import NotRows
from sageLLM.codegen.kernel.lower import row_program, why_no_rows
from sageLLM.codegen.kernel.mask import mask_bounds
from sageLLM.codegen.kernel.parts import output_parts
from sageLLM.codegen.kernel.rows import Affine, Load, Location, Loop, Nest, RowProgram, Store, Sweep
from sageLLM.codegen.kernel.text import row_text
from sageLLM.codegen.model.specs import Specs

PROGRAMS = {
    "rms_norm": """
rows iR < R
  sweep iH < H
    xf = f32(x[iR, iH])
    ms <- mean of (xf * xf)
  sweep iH < H
    xf = f32(x[iR, iH])
    n = E((xf * rsqrt((ms + eps))))
    y[iR, iH] := ((n * w[iH]) if w else n)
""",
    "fused_add_rms_norm": """
rows iT < T
  sweep iH < H
    h = (x[iT, iH] + residual[iT, iH])
    xf = f32(h)
    ms <- mean of (xf * xf)
    h[iT, iH] := h
  sweep iH < H
    h = h[iT, iH]
    xf = f32(h)
    n = E((xf * rsqrt((ms + eps))))
    y[iT, iH] := ((n * w[iH]) if w else n)
""",
    "rope_interleaved": """
rows iT < T, iN < N
  iP = pos[iT]
  sweep iDr < Dr // 2
    c = cos[iP, iDr]
    s = sin[iP, iDr]
    a = f32(x[iT, iN, 2*iDr])
    b = f32(x[iT, iN, 1 + 2*iDr])
    y1 = E(((a * c) - (b * s)))
    y2 = E(((b * c) + (a * s)))
    y[iT, iN, 2*iDr] := y1
    y[iT, iN, 1 + 2*iDr] := y2
  sweep iDDr < D - Dr
    same = x[iT, iN, Dr + iDDr]
    y[iT, iN, Dr + iDDr] := same
""",
    "combine_experts": """
rows iT < T
  sweep iH < H
    sumA = sum over iA < A of (f32(x[iT, iA, iH]) * weights[iT, iA])
    y[iT, iH] := E(sumA)
""",
    "router_logits": """
rows iT < T, iX < X
  sweep iK < K
    acc <- sum of (f32(x[iT, iK]) * f32(w[iX, iK]))
  logits[iT, iX] := ((acc + f32(bias[iX])) if bias else acc)
""",
    "concat_rows": """
rows iTa < Ta
  sweep iH < H
    first = a[iTa, iH]
    y[iTa, iH] := first
rows iTb < Tb
  sweep iH < H
    rest = b[iTb, iH]
    y[Ta + iTb, iH] := rest
""",
    "kv_store": """
rows iT < T, iNkv < Nkv
  iPG = (slots[iT] // BS)
  iBS = (slots[iT] % BS)
  sweep iD < D
    k_out[iPG, iBS, iNkv, iD] := k[iT, iNkv, iD]
  sweep iDv < Dv
    v_out[iPG, iBS, iNkv, iDv] := v[iT, iNkv, iDv]
""",
}
PARTS = {
    "split_qkv": {
        "q": ("qkv", "0", ["qkv_T", "D", "1"], []),
        "k": ("qkv", "D * Nq", ["qkv_T", "D", "1"], []),
        "v": ("qkv", "D * (Nkv + Nq)", ["qkv_T", "D", "1"], []),
    },
    "merge_heads": {"y": ("x", "0", ["x_T", "1"], [("x_N", "D")])},
    "split_rows": {"a": ("x", "0", ["x_D0", "1"], []), "b": ("x", "Ta * x_D0", ["x_D0", "1"], [])},
    "concat_rows": None,
    "add": None,
    "embedding": None,
}


@pytest.fixture(scope="module")
def specs() -> Specs:
    return load_and_link()


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, specs: Specs) -> None:
    assert row_text(row_program(specs.ops[name], specs.ops)) == PROGRAMS[name].lstrip()


def test_a_fused_op_is_all_its_calls(specs: Specs) -> None:
    """Norm, rotation and store of queries and keys: one nest for either, and nothing between that is written."""
    program = row_program(specs.ops["qk_norm_rope_kv_store"], specs.ops)
    stored = [{place.operand for place in places(nest)} for nest in program.nests]
    assert stored == [{"q"}, {"k_out", "v_out"}]
    assert [len(nest.sweeps) for nest in program.nests] == [3, 3]


def places(nest: Nest) -> list[Location]:
    return [step.location for sweep in nest.sweeps for step in sweep.steps if isinstance(step, Store)]


@pytest.mark.parametrize("name", PARTS)
def test_outputs_that_are_parts_of_inputs(name: str, specs: Specs) -> None:
    op = specs.ops[name]
    strides = {o.name: (*map(Size.symbol, stride_names(o)), Size.of(1)) for o in (*op.inputs, *op.outputs)}
    found = output_parts(row_program(op, specs.ops), strides)
    shown = found and {
        output: (
            part.base,
            formula(part.offset),
            [formula(size) for size in part.strides],
            [(formula(a), formula(b)) for a, b in part.where],
        )
        for output, part in found.items()
    }
    assert shown == PARTS[name]


def test_an_op_that_is_no_row_program_says_why(specs: Specs) -> None:
    assert why_no_rows(specs.ops["rms_norm"], specs.ops) is None
    assert why_no_rows(specs.ops["sample"], specs.ops) == "its meaning is a reference, not equations"


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (("iT",), None),
        (("iV",), "other rows read"),
        ((), "other rows read"),
    ],
)
def test_an_output_may_not_overwrite_what_other_rows_read(index: tuple[str, ...], why: str | None) -> None:
    f32 = ValueType("f32")
    read = Location("x", (*(Affine.of(name) for name in index), Affine.of("iH")))
    store = Store(Location("y", (Affine.of("iT"), Affine.of("iH"))), Load(f32, read))
    nest = Nest((Loop("iT", Size.symbol("T")),), (Sweep(Loop("iH", Size.symbol("H")), (store,)),))
    if why is None:
        check_inplace(RowProgram((nest,)), {"y": "x"})
        return
    with pytest.raises(NotRows, match=why):
        check_inplace(RowProgram((nest,)), {"y": "x"})


def test_an_output_may_not_overwrite_what_a_later_sweep_reads() -> None:
    f32, h, other = ValueType("f32"), Affine.of("iH"), Affine(Size.of(1), (("iH", Size.of(1)),))
    first = Store(Location("y", (Affine.of("iT"), h)), Number(f32, 1.0))
    again = Store(Location("z", (Affine.of("iT"), h)), Load(f32, Location("x", (Affine.of("iT"), other))))
    sweeps = tuple(Sweep(Loop("iH", Size.symbol("H")), (store,)) for store in (first, again))
    with pytest.raises(NotRows, match="read after it is written"):
        check_inplace(RowProgram((Nest((Loop("iT", Size.symbol("T")),), sweeps),)), {"y": "x"})


def test_bounds_of_masks(specs: Specs) -> None:
    masks = {
        name: next(hook.value for hook in reference.hooks if hook.name == "mask_mod")
        for name in ("paged_prefill_attention", "varlen_attention")
        if (reference := specs.ops[name].reference)
    }
    paged, varlen = (mask_bounds(mask) for mask in masks.values())
    assert paged.is_causal and [(w.attr, w.is_symmetric) for w in paged.windows] == [("window", False)]
    assert not varlen.is_causal and varlen.causal_attr == "causal"
    assert [(w.attr, w.is_symmetric) for w in varlen.windows] == [("window", True)]
    assert paged.is_exact and varlen.is_exact
    nothing = mask_bounds(Ref(ValueType("bool"), "somewhere"))
    assert not nothing.is_causal and not nothing.windows and nothing.causal_attr is None
    assert not nothing.is_exact
