"""Hand-written op declarations, in the form of generated code, for the tests of the graph library."""

from types import SimpleNamespace

import pytest

from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.nodes import OpTypeBase
from sageLLM.runtime.core.ir.op_node import AttrSpec, OpNode, Where
from sageLLM.runtime.core.ir.types import E, f32, i32

K, N, T, D, M, P, KV = dims("K N T D M P KV")


class OpType(OpTypeBase):
    PREFILL_ATTN = "prefill_attn"
    DECODE_ATTN = "decode_attn"
    FFN = "ffn"
    LINEAR = "linear"
    VIEW = "view"
    ROPE = "rope"
    COMM_ALLREDUCE = "comm_allreduce"
    COMM_ALLGATHER = "comm_allgather"
    COMM_SEND = "comm_send"
    KV_LOAD = "kv_load"
    KV_STORE = "kv_store"
    KV_MIGRATE = "kv_migrate"


class Linear(OpNode):
    op = "linear"
    kind = OpType.LINEAR
    tags = frozenset({"gemm"})
    input_types = {"x": E[..., K], "w": E[N, K], "bias": E[N], "scale": f32[N]}
    optional_inputs = frozenset({"bias", "scale"})
    output_types = {"y": E[..., N]}
    attr_types = {"alpha": AttrSpec("f32", default=1.0, min=0.0), "mode": AttrSpec("str", None, choices=("a", "b"))}
    flop_formula = 2 * dims("R")[0] * N * K
    byte_formula = (dims("R")[0] * (K + N) + N * K + dims("has_bias")[0] * N) * dims("E_size")[0]


class SiluMul(OpNode):
    op = "silu_mul"
    kind = OpType.LINEAR
    input_types = {"gu": E[T, 2 * M]}
    output_types = {"y": E[T, M]}


class Halves(OpNode):
    """A view: two halves of the columns."""

    op = "halves"
    kind = OpType.VIEW
    tags = frozenset({"view"})
    input_types = {"x": E[T, 2 * M]}
    output_types = {"a": E[T, M], "b": E[T, M]}


class Rope(OpNode):
    op = "rope"
    kind = OpType.ROPE
    input_types = {"x": E[T, N, D], "pos": i32[T], "cos": f32[P, D // 2]}
    output_types = {"y": E[T, N, D]}
    inplace = {"y": "x"}


class Scale(OpNode):
    op = "scale"
    kind = OpType.LINEAR
    input_types = {"x": E[...,]}
    output_types = {"y": E[...,]}
    inplace = {"y": "x"}


class Attention(OpNode):
    op = "attention"
    kind = OpType.DECODE_ATTN
    input_types = {"q": E[T, N, D], "k": E[P, K, D]}
    output_types = {"o": E[T, N * D]}
    attr_types = {"scale": AttrSpec("f32", default=lambda env: env["D"] ** -0.5), "W": AttrSpec("dim", default=2)}
    where = (Where("N % K == 0", lambda env: env["N"] % env["K"] == 0),)
    flop_formula = 4 * KV * N * D


@pytest.fixture(scope="session")
def lib() -> SimpleNamespace:
    classes = (Linear, SiluMul, Halves, Rope, Scale, Attention)
    return SimpleNamespace(OpType=OpType, ops={c.op: c for c in classes}, **{c.__name__: c for c in classes})
