"""Tests of op nodes: operands, attributes, outputs and costs by an op's declaration."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from sageLLM.runtime.core.errors import TypeMismatch, VerifyError
from sageLLM.runtime.core.ir.dims import Dim, dims
from sageLLM.runtime.core.ir.nodes import AttrValue, ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import REQUIRED, AttrSpec
from sageLLM.runtime.core.ir.types import TensorType

T, KV, N = dims("T KV N")


def t(*shape: Dim) -> TensorType:
    return TensorType("f32", shape)


def ref(name: str, *shape: Dim, dtype: str = "f32") -> TensorRef:
    return TensorRef(name, shape, dtype)


def test_op_type_families(lib: SimpleNamespace) -> None:
    assert {k.name for k in lib.OpType if k.is_comm} == {"COMM_ALLREDUCE", "COMM_ALLGATHER", "COMM_SEND"}
    assert {k.name for k in lib.OpType if k.is_kv} == {"KV_LOAD", "KV_STORE", "KV_MIGRATE"}


def test_tensor_sizes() -> None:
    assert ref("x", 2, 3).num_elements == 6
    assert ref("x", 2, 3, dtype="bf16").num_bytes == 12
    assert str(ref("x", 2, T)) == "x: f32[2, T]"
    with pytest.raises(ValueError, match=re.escape("x: f32[2, T]: the number of elements is symbolic; bind 2*T")):
        _ = ref("x", 2, T).num_elements
    with pytest.raises(ValueError, match=re.escape("x: f8[2]: unknown element type, expected one of bool, i8")):
        _ = ref("x", 2, dtype="f8").num_bytes


def test_the_seed_signature(lib: SimpleNamespace) -> None:
    """Names, order and defaults that other modules were promised."""
    node = ExecutionNode("a", lib.OpType.FFN, [ref("x", 1)], [ref("y", 1)])
    assert (node.dependencies, node.device_id, node.stream_id) == (set(), 0, 0)
    assert (node.estimated_time_us, node.memory_bytes, node.layer_id, node.metadata) == (0.0, 0, None, {})
    assert ExecutionNode("a", lib.OpType.FFN, [], [], {"b"}, 1, 2, 3.0, 4, 5, {"k": 6}).metadata == {"k": 6}
    assert TensorRef("x", (1,), "f32").device_id == 0
    assert node.op == "ffn"
    node.metadata["op"] = "moe"
    assert node.op == "moe"


def test_a_copy_shares_nothing_that_changes(lib: SimpleNamespace) -> None:
    node = ExecutionNode("a", lib.OpType.FFN, [ref("x", 1)], [], {"b"}, metadata={"k": [1]}, attrs={"n": 1})
    copy = node.copy()
    assert copy == node
    copy.inputs.clear()
    copy.dependencies.clear()
    copy.metadata["k"].append(2)
    copy.attrs["n"] = 2
    assert (node.inputs, node.dependencies, node.metadata, node.attrs) == ([ref("x", 1)], {"b"}, {"k": [1]}, {"n": 1})


def test_inference_fills_in_defaults(lib: SimpleNamespace) -> None:
    found = lib.Attention.resolve({"q": t(T, 4, 16), "k": t(9, 2, 16)}, {})
    assert found.outputs == (t(T, 64),)
    assert found.attrs == {"scale": 0.25, "W": 2}
    assert lib.Linear.infer({"x": t(T, 8), "w": t(3, 8)}, {}) == {"y": t(T, 3)}


@pytest.mark.parametrize(
    ("op", "types", "attrs", "message"),
    [
        ("linear", {"x": t(T, 8)}, {}, "linear: operand 'w' is missing"),
        (
            "linear",
            {"x": t(T, 8), "w": t(3, 8), "b": t(3)},
            {},
            "linear: unknown operand 'b', expected x, w, bias, scale",
        ),
        ("linear", {"x": t(8), "w": t(3, 8)}, {"beta": 1}, "linear: unknown attribute 'beta', expected alpha, mode"),
        ("silu_mul", {"gu": t(T, 8)}, {"beta": 1}, "silu_mul: unknown attribute 'beta', expected none"),
        ("linear", {"x": t(8), "w": t(3, 8)}, {"alpha": "1"}, "linear: attribute 'alpha': expected f32, got '1'"),
        (
            "linear",
            {"x": t(8), "w": t(3, 8)},
            {"alpha": -1.0},
            "linear: attribute 'alpha': expected at least 0.0, got -1.0",
        ),
        ("linear", {"x": t(8), "w": t(3, 8)}, {"mode": "c"}, "linear: attribute 'mode': expected one of a, b, got 'c'"),
        ("attention", {"q": t(T, 3, 16), "k": t(9, 2, 16)}, {}, "attention: requires N % K == 0 (N = 3, K = 2)"),
    ],
)
def test_mismatches_with_a_declaration(
    lib: SimpleNamespace, op: str, types: dict[str, TensorType], attrs: dict[str, AttrValue], message: str
) -> None:
    with pytest.raises(TypeMismatch) as caught:
        lib.ops[op].infer(types, attrs)
    assert str(caught.value) == message


def test_a_condition_on_symbolic_sizes_waits(lib: SimpleNamespace) -> None:
    assert lib.Attention.infer({"q": t(T, N, 16), "k": t(9, 2, 16)}, {"scale": 1.0}) == {"o": t(T, 16 * N)}


@pytest.mark.parametrize(
    ("spec", "value", "rule"),
    [
        (AttrSpec("f32"), 1, None),
        (AttrSpec("f32"), True, "f32"),
        (AttrSpec("i32"), 1.5, "i32"),
        (AttrSpec("i32", min=1, max=4), 5, "at most 4"),
        (AttrSpec("i32", default=None), None, None),
        (AttrSpec("i32"), None, "i32"),
        (AttrSpec("bool"), False, None),
        (AttrSpec("bool"), 0, "bool"),
        (AttrSpec("dim"), 2 * T, None),
        (AttrSpec("dim"), "T", "dim"),
        (AttrSpec("f32", min=0.0), float("nan"), "at least 0.0"),
    ],
)
def test_attribute_values(spec: AttrSpec, value: AttrValue, rule: str | None) -> None:
    assert spec.broken_rule(value) == rule


def test_required_is_called_so() -> None:
    assert repr(AttrSpec("f32").default) == "REQUIRED"
    assert AttrSpec("f32").default is REQUIRED


def node_of(lib: SimpleNamespace, **changes: Any) -> Any:
    fields: dict[str, Any] = {"inputs": [ref("x", T, 8), ref("w", 3, 8)], "outputs": [ref("y", T, 3)]}
    return lib.Linear("n", lib.OpType.LINEAR, **(fields | changes))


def test_operands_by_name(lib: SimpleNamespace) -> None:
    node = node_of(lib)
    assert node.input("w") == ref("w", 3, 8)
    assert node.output("y") == ref("y", T, 3)
    assert node.optional_input("bias") is None
    scaled = node_of(lib, inputs=[*node.inputs, ref("s", 3)], metadata={"operands": ["x", "w", "scale"]})
    assert scaled.input("scale") == ref("s", 3)
    assert scaled.optional_input("bias") is None
    scaled.verify()
    for ask, message in (
        (lambda: node.input("bias"), "n: operand 'bias' of linear is absent"),
        (lambda: node.input("z"), "linear: unknown operand 'z'"),
        (lambda: node.output("z"), "linear: unknown output 'z'"),
    ):
        with pytest.raises(KeyError, match=message):
            ask()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": [ref("y", T, 4)]}, "n: linear: output 'y': expected f32[T, 3], got f32[T, 4]"),
        ({"outputs": []}, "n: linear: expected 1 outputs, got 0"),
        (
            {"inputs": [ref("x", T, 8), ref("w", 3, 9)]},
            "n: linear: operand 'w': expected E[N, K], got f32[3, 9] with K = 8 (from x)",
        ),
        ({"metadata": {"operands": ["x"]}}, "n: linear: expected 1 operands, got 2"),
        ({"attrs": {"alpha": None}}, "n: linear: attribute 'alpha': expected f32, got None"),
    ],
)
def test_verify_names_node_and_rule(lib: SimpleNamespace, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        node_of(lib, **changes).verify()
    assert str(caught.value) == message


def test_costs_are_formulas_until_sizes_are_known(lib: SimpleNamespace) -> None:
    node = node_of(lib)
    batched = node_of(lib, inputs=[ref("x", 5, T, 8), ref("w", 3, 8)], outputs=[ref("y", 5, T, 3)])
    assert str(batched.flops()) == "240*T"
    assert batched.flops({"T": 2}) == 480
    assert node.bytes_moved({"T": 2}) == 4 * (2 * 11 + 24)
    biased = node_of(lib, inputs=[*node.inputs, ref("b", 3)])
    assert biased.bytes_moved() == node.bytes_moved() + 12


def test_symbols_of_the_step_come_from_the_caller(lib: SimpleNamespace) -> None:
    node = lib.Attention("a", lib.OpType.DECODE_ATTN, [ref("q", T, 4, 16), ref("k", 9, 2, 16)], [ref("o", T, 64)])
    assert node.flops() == 256 * KV
    assert node.flops({"KV": 10}) == 2560
    assert node.dims() == {"E": "f32", "T": T, "N": 4, "D": 16, "P": 9, "K": 2, "R": 1, "W": 2}
