"""Row programs of ops: rows, sweeps and stores, and the reasons of ops that have none."""

import pytest

from sageLLM.codegen.driver import load_and_link
from sageLLM.codegen.emit.cpp_arguments import stride_names
from sageLLM.codegen.expr.size import Size, formula
from sageLLM.codegen.expr.tree import Number, Ref
from sageLLM.codegen.expr.types import ValueType
from sageLLM.codegen.kernel.check import check_inplace
from sageLLM.codegen.kernel.indexing import LoweringError
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.lower import row_program, why_not_lowered
from sageLLM.codegen.kernel.mask import mask_bounds
from sageLLM.codegen.kernel.parts import output_parts
from sageLLM.codegen.kernel.rows import Affine, Load, Location, Loop, Nest, RowProgram, Store, Sweep
from sageLLM.codegen.kernel.text import row_text
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.specs import Specs

PROGRAMS = {
    "rms_norm": """
rows i_R < R
  sweep i_H < H
    xf = f32(x[i_R, i_H])
    ms <- mean of (xf * xf)
  sweep i_H < H
    xf = f32(x[i_R, i_H])
    n = E((xf * rsqrt((ms + eps))))
    y[i_R, i_H] := ((n * w[i_H]) if w else n)
""",
    "fused_add_rms_norm": """
rows i_T < T
  sweep i_H < H
    h = (x[i_T, i_H] + residual[i_T, i_H])
    xf = f32(h)
    ms <- mean of (xf * xf)
    h[i_T, i_H] := h
  sweep i_H < H
    h = h[i_T, i_H]
    xf = f32(h)
    n = E((xf * rsqrt((ms + eps))))
    y[i_T, i_H] := ((n * w[i_H]) if w else n)
""",
    "rope_interleaved": """
rows i_T < T, i_N < N
  i_P = pos[i_T]
  sweep i_Dr < Dr // 2
    c = cos[i_P, i_Dr]
    s = sin[i_P, i_Dr]
    a = f32(x[i_T, i_N, 2*i_Dr])
    b = f32(x[i_T, i_N, 1 + 2*i_Dr])
    y1 = E(((a * c) - (b * s)))
    y2 = E(((b * c) + (a * s)))
    y[i_T, i_N, 2*i_Dr] := y1
    y[i_T, i_N, 1 + 2*i_Dr] := y2
  sweep i_DDr < D - Dr
    same = x[i_T, i_N, Dr + i_DDr]
    y[i_T, i_N, Dr + i_DDr] := same
""",
    "combine_experts": """
rows i_T < T
  sweep i_H < H
    sum_over_A = sum over j_A < A of (f32(x[i_T, j_A, i_H]) * weights[i_T, j_A])
    y[i_T, i_H] := E(sum_over_A)
""",
    "router_logits": """
rows i_T < T, i_X < X
  sweep i_K < K
    acc <- sum of (f32(x[i_T, i_K]) * f32(w[i_X, i_K]))
  logits[i_T, i_X] := ((acc + f32(bias[i_X])) if bias else acc)
""",
    "concat_rows": """
rows i_Ta < Ta
  sweep i_H < H
    first = a[i_Ta, i_H]
    y[i_Ta, i_H] := first
rows i_Tb < Tb
  sweep i_H < H
    rest = b[i_Tb, i_H]
    y[Ta + i_Tb, i_H] := rest
""",
    "kv_store": """
rows i_T < T, i_Nkv < Nkv
  i_PG = (slots[i_T] // BS)
  i_BS = (slots[i_T] % BS)
  sweep i_D < D
    k_out[i_PG, i_BS, i_Nkv, i_D] := k[i_T, i_Nkv, i_D]
  sweep i_Dv < Dv
    v_out[i_PG, i_BS, i_Nkv, i_Dv] := v[i_T, i_Nkv, i_Dv]
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
def specs(memo: LinkMemo) -> Specs:
    return load_and_link(memo=memo)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str, specs: Specs) -> None:
    assert row_text(row_program(specs.ops[name], Programs(specs.ops))) == PROGRAMS[name].lstrip()


def test_a_fused_op_is_all_its_calls(specs: Specs) -> None:
    """Norm, rotation and store of queries and keys: one nest each, without intermediate results in memory."""
    program = row_program(specs.ops["qk_norm_rope_kv_store"], Programs(specs.ops))
    stored = [{location.operand for location in stored_locations(nest)} for nest in program.nests]
    assert stored == [{"q"}, {"k_out", "v_out"}]
    assert [len(nest.sweeps) for nest in program.nests] == [3, 3]


def stored_locations(nest: Nest) -> list[Location]:
    return [step.location for sweep in nest.sweeps for step in sweep.steps if isinstance(step, Store)]


@pytest.mark.parametrize("name", PARTS)
def test_outputs_that_are_parts_of_inputs(name: str, specs: Specs) -> None:
    op = specs.ops[name]
    strides = {o.name: (*map(Size.symbol, stride_names(o)), Size.of(1)) for o in (*op.inputs, *op.outputs)}
    found = output_parts(row_program(op, Programs(specs.ops)), strides)
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


def test_an_op_without_a_row_program_has_a_reason(specs: Specs) -> None:
    assert why_not_lowered(specs.ops["rms_norm"], Programs(specs.ops)) is None
    assert why_not_lowered(specs.ops["sample"], Programs(specs.ops)) == "it is defined by a reference, not by equations"


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (("i_T",), None),
        (("i_V",), "other rows read"),
        ((), "other rows read"),
    ],
)
def test_an_output_may_not_overwrite_elements_that_other_rows_read(index: tuple[str, ...], why: str | None) -> None:
    f32 = ValueType("f32")
    read = Location("x", (*(Affine.of(name) for name in index), Affine.of("i_H")))
    store = Store(Location("y", (Affine.of("i_T"), Affine.of("i_H"))), Load(f32, read))
    nest = Nest((Loop("i_T", Size.symbol("T")),), (Sweep(Loop("i_H", Size.symbol("H")), (store,)),))
    if why is None:
        check_inplace(RowProgram((nest,)), {"y": "x"})
        return
    with pytest.raises(LoweringError, match=why):
        check_inplace(RowProgram((nest,)), {"y": "x"})


def test_an_output_may_not_overwrite_elements_that_a_later_sweep_reads() -> None:
    f32, h, other = ValueType("f32"), Affine.of("i_H"), Affine(Size.of(1), (("i_H", Size.of(1)),))
    first = Store(Location("y", (Affine.of("i_T"), h)), Number(f32, 1.0))
    again = Store(Location("z", (Affine.of("i_T"), h)), Load(f32, Location("x", (Affine.of("i_T"), other))))
    sweeps = tuple(Sweep(Loop("i_H", Size.symbol("H")), (store,)) for store in (first, again))
    with pytest.raises(LoweringError, match="read after it is written"):
        check_inplace(RowProgram((Nest((Loop("i_T", Size.symbol("T")),), sweeps),)), {"y": "x"})


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
    assert paged.chunks == ("chunk",) and not varlen.chunks
    assert paged.is_exact and varlen.is_exact
    other = mask_bounds(Ref(ValueType("bool"), "somewhere"))
    assert not other.is_causal and not other.windows and other.causal_attr is None
    assert not other.is_exact
    everything = mask_bounds(Number(ValueType("bool"), True))
    assert everything.is_exact and not everything.is_causal and not everything.windows
