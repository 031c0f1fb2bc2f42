"""GEMMs found in the equations of ops, and their epilogues."""

from pathlib import Path

import pytest

from sageLLM.codegen import driver
from sageLLM.codegen.kernel.cost import with_kernel_cost
from sageLLM.codegen.kernel.epilogue import fused_epilogue_of
from sageLLM.codegen.kernel.gemm import gemm_of
from sageLLM.codegen.kernel.inline import Programs
from sageLLM.codegen.kernel.lower import why_not_lowered
from sageLLM.codegen.link.memo import LinkMemo
from sageLLM.codegen.model.specs import Specs

OWN_OPS = """schema: ops/v1
ops:
  linear_tanh_scaled:
    summary: A GEMM with an attr, a residual and a function in its epilogue.
    op_type: LINEAR
    inputs: {x: "E[T, K]", w: "E[N, K]", r: "E[T, N]"}
    attrs: {factor: {type: f32, default: 2.0}}
    outputs: {y: "E[T, N]"}
    compute: y = E(tanh(dot(x, w, K)) * factor) + r
  swapped_gates:
    summary: Two gates, the second one first.
    op_type: LINEAR
    inputs: {x: "E[..., K]", w: "E[2*I, K]"}
    outputs: {y: "E[..., I]"}
    fuses:
      - gu = linear(x, w)
      - h = swapped(gu)
      - y = relu(h)
  swapped:
    summary: The second half less the first.
    op_type: ACTIVATION
    inputs: {gu: "E[..., 2*I]"}
    outputs: {y: "E[..., I]"}
    views: {a: "gu[..., 0:I]", b: "gu[..., I:2*I]"}
    compute: y = b - a
  normed:
    summary: An epilogue that reads the whole row of the result.
    op_type: LINEAR
    inputs: {x: "E[T, K]", w: "E[N, K]"}
    outputs: {y: "E[T, N]"}
    compute: |
      h = dot(x, w, K)
      y = E(h / mean(h * h, N))
  greedy_head:
    summary: A GEMM and its consumer, without the optional operands.
    inputs: {x: "E[S, H]", w: "E[V, H]"}
    outputs: {best: "i64[S]", scores: "f32[S, V]"}
    fuses:
      - scores = lm_head(x, w)
      - best = sample(scores)
  hidden_scores:
    summary: The consumer reads a result that is not an output.
    inputs: {x: "E[S, H]", w: "E[V, H]"}
    outputs: {best: "i64[S]"}
    fuses:
      - scores = lm_head(x, w)
      - best = sample(scores)
  normed_head:
    summary: The consumer reads a result that is not a GEMM's.
    inputs: {x: "f32[S, V]", w: "f32[V]"}
    outputs: {scores: "f32[S, V]", best: "i64[S]"}
    fuses:
      - scores = rms_norm(x, w)
      - best = sample(scores)
  normed_rows:
    summary: The values of a norm before the product are an output too.
    inputs: {x: "E[T, K]", w: "E[K]", m: "E[N, K]"}
    outputs: {n: "E[T, K]", y: "E[T, N]"}
    fuses:
      - n = rms_norm(x, w)
      - y = linear(n, m)
  overwritten_rows:
    summary: The product reads an input that an output overwrites.
    inputs: {x: "E[T, K]", r: "E[T, K]", m: "E[N, K]"}
    outputs: {y: "E[T, N]", h: "E[T, K]"}
    fuses:
      - h = add(x, r)
      - y = linear(r, m)
    inplace: {h: r}
  overwritten_later:
    summary: The epilogue reads an input that the prologue overwrites.
    inputs: {x: "E[T, K]", r: "E[T, N]", m: "E[N, K]", c: "E[T, N]"}
    outputs: {y: "E[T, N]", z: "E[T, N]"}
    fuses:
      - z = add(r, c)
      - h = linear(x, m)
      - y = add(r, h)
    inplace: {z: r}
  two_products:
    summary: Only one product can be a GEMM.
    inputs: {x: "E[T, K]", up: "E[I, K]", down: "E[N, I]"}
    outputs: {y: "E[T, N]"}
    fuses:
      - h = linear(x, up)
      - y = linear(h, down)
  wide_rows:
    summary: The values before the product have another element type than the weight.
    op_type: LINEAR
    inputs: {x: "E[T, K]", m: "E[N, K]"}
    outputs: {y: "E[T, N]"}
    compute: y = E(dot(tanh(f32(x)), f32(m), K))
  other_way:
    summary: The weight stored the other way round.
    op_type: LINEAR
    inputs: {x: "E[T, K]", w: "E[K, N]"}
    outputs: {y: "E[T, N]"}
    compute: y = E(dot(x, w, K))
"""


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory, memo: LinkMemo) -> Specs:
    folder = tmp_path_factory.mktemp("specs")
    Path(folder, "own.yaml").write_text(OWN_OPS)
    return driver.load_and_link([folder], memo=memo)


def test_gemms_are_found_by_their_equations(specs: Specs) -> None:
    found = {name: gemm_of(op, Programs(specs.ops)) for name, op in specs.ops.items()}
    gates = {name: gemm.gates for name, gemm in found.items() if gemm}
    base = {"linear", "lm_head", "head_linear", "router_logits", "linear_silu_mul", "linear_add", "lm_head_soft_cap"}
    assert base <= gates.keys()
    assert {name: gates[name] for name in ("linear", "linear_silu_mul", "linear_tanh_scaled", "swapped_gates")} == {
        "linear": 1, "linear_silu_mul": 2, "linear_tanh_scaled": 1, "swapped_gates": 2
    }  # fmt: skip
    assert not {"add", "rms_norm", "silu_mul", "embedding", "normed", "other_way"} & gates.keys()


def test_prologues_are_found_where_each_row_can_be_computed_once(specs: Specs) -> None:
    programs = Programs(specs.ops)
    normed = gemm_of(specs.ops["normed_rows"], programs)
    assert normed is not None and normed.x.name == "n"
    assert normed.prologue is not None and not normed.prologue.in_scratch
    refused = ("overwritten_rows", "overwritten_later", "two_products", "wide_rows")
    assert [gemm_of(specs.ops[name], programs) for name in refused] == [None] * 4
    reused = [why_not_lowered(specs.ops[name], programs) for name in ("overwritten_rows", "overwritten_later")]
    assert reused == ["'h' reuses the memory of 'r', which is read after it is written",
                      "'z' reuses the memory of 'r', which is read after it is written"]  # fmt: skip


def test_the_cost_counts_values_that_a_product_computes_again(specs: Specs) -> None:
    programs = Programs(specs.ops)
    for name in ("normed_rows", "linear_silu_mul", "lm_head_sample", "add"):
        assert with_kernel_cost(specs.ops[name], programs) == specs.ops[name]
    declared, real = specs.ops["two_products"], with_kernel_cost(specs.ops["two_products"], programs)
    assert str(declared.cost.flops) == "2 * I * T * (K + N)"
    assert str(real.cost.flops) == "2 * I * N * T * (K + 1)"  # each element of y computes a whole row of h
    text = next(output.text for output in driver.emit(specs) if output.path == "ops/own.py")
    assert "flop_formula = 2 * I * N * T * (K + 1)" in text


def test_an_epilogue_reads_its_sums_and_its_own_row(specs: Specs) -> None:
    outputs = {output.path: output.text for output in driver.emit(specs)}
    text = outputs["kernels/cpu/own.cpp"]
    assert '#include "gemm.h"' in text
    assert (
        "store(y + i_T * y_T, i_N, to<E>(to<E>(tanh(load(sums, Block{0})) * factor) + load(r + i_T * r_T, i_N)));"
        in text
    )
    assert text.count("const GemmArgs<E, Weight> args") == 4
    assert "const GemmArgs<E, Weight> args = {R, K, I, 2, w};" in text


def test_a_consumer_fuses_with_the_gemm_that_it_reads(specs: Specs) -> None:
    found = {name for name, op in specs.ops.items() if fused_epilogue_of(op, Programs(specs.ops))}
    assert found == {"lm_head_sample", "lm_head_scale_sample", "lm_head_soft_cap_sample", "greedy_head"}
    outputs = {output.path: output.text for output in driver.emit(specs)}
    text, launcher = outputs["kernels/cpu/own.cpp"], outputs["kernels/triton/own.py"]
    body = text[text.index("SAGE_KERNEL(greedy_head)") :]
    assert "store(scores + i_S * scores_S, i_V, part_epilogue.observe(i_S, i_V, to<E>(acc)));" in body
    assert "const CandidateFilters filters = {nullptr, nullptr, nullptr, nullptr, nullptr};" in body
    assert not {"SAGE_KERNEL(hidden_scores)", "SAGE_KERNEL(normed_head)"} & set(text.split())
    assert "def greedy_head(" in launcher and launcher.count("return best, scores") == 2
    assert "from sageLLM.generated.kernels.reference.sampling import sample as reference_sample" in launcher
