"""Native plans of a few nodes: shared memory, copies, calls in Python, and changes of size."""

import pytest
import torch
from torch import Tensor

from sageLLM.generated import ops
from sageLLM.generated.kernels.reference import KERNELS
from sageLLM.runtime.core.ir.dims import dims
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.native import NativeRunner

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")
(T,) = dims("T")


def writer() -> GraphWriter:
    return GraphWriter("small", level="kernel", stage=None, dtype="f32")


def check(
    graph: ExecutionGraph, runner: NativeRunner, inputs: dict[str, Tensor], bound: dict[str, Tensor]
) -> NativePlan:
    """Runs the graph both ways, with memory poisoned and not, and compares."""
    expected = Plan(graph, KERNELS, bound).run({name: x.clone() for name, x in inputs.items()})
    for poison in (True, False):
        plan = NativePlan(graph, runner, KERNELS, bound, poison=poison)
        for found, one in zip(plan.run(inputs), expected, strict=True):
            torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)
    return plan


def test_a_value_is_not_overwritten_before_its_last_read(runner: NativeRunner) -> None:
    g = writer()
    x, r, w = g.input("x", "f32", T, 24), g.input("r", "f32", T, 24), g.weight("w", "f32", 24)
    residual = ops.add(g, x, r)
    normed, h = ops.fused_add_rms_norm(g, residual, x, w, eps=1e-6)
    both = ops.add(g, ops.add(g, normed, h), residual)  # `h` could be made in place of `residual`, but for this
    tensors = {"x": torch.randn(5, 24), "r": torch.randn(5, 24)}
    kept = {name: x.clone() for name, x in tensors.items()}
    check(g.finish([both]), runner, tensors, {"w": torch.randn(24)})
    assert all(torch.equal(tensors[name], x) for name, x in kept.items()), "inputs are the caller's"


def test_views_share_memory_and_irregular_layouts_are_copied(runner: NativeRunner) -> None:
    g = writer()
    qkv, w = g.input("qkv", "f32", T, 6 * 8), g.weight("w", "f32", 8)
    q, k, v = ops.split_qkv(g, qkv, Nq=4, Nkv=1, D=8)
    normed = ops.rms_norm(g, q, w, eps=1e-6)  # the rows of q are not equidistant
    flat = ops.merge_heads(g, normed)
    a, b = ops.split_halves(g, flat)
    graph = g.finish([ops.mul(g, a, b), ops.add(g, k, v)])
    check(graph, runner, {"qkv": torch.randn(7, 48)}, {"w": torch.randn(8)})


def test_an_op_without_a_kernel_runs_in_python_between_native_calls(runner: NativeRunner) -> None:
    g = writer()
    x, w = g.input("x", "f32", T, 16), g.weight("w", "f32", 1, 16, 16)
    y = ops.add(g, x, x)
    z = ops.head_linear(g, ops.split_heads(g, y, N=1, D=16), w)
    graph = g.finish([ops.add(g, ops.merge_heads(g, z), y)])
    without = WithoutKernel(runner, "head_linear")
    plan = check(graph, without, {"x": torch.randn(3, 16)}, {"w": torch.randn(1, 16, 16)})
    assert plan.python_calls == {"head_linear": (1, "no kernel")}


class WithoutKernel(NativeRunner):
    """The functions of another runner except one."""

    def __init__(self, runner: NativeRunner, op: str) -> None:
        self.__dict__.update(runner.__dict__)
        self.kernels = {name: kernel for name, kernel in runner.kernels.items() if name != op}


def test_sizes_grow_and_shrink(runner: NativeRunner) -> None:
    g = writer()
    x = g.input("x", "f32", T, 32)
    y = ops.silu_mul(g, ops.add(g, x, x))
    graph = g.finish([ops.add(g, y, y)])
    plan, plain = NativePlan(graph, runner, KERNELS, {}, poison=True), Plan(graph, KERNELS, {})
    for num_rows in (3, 1, 40, 3, 0, 129):
        rows = torch.randn(num_rows, 32)
        torch.testing.assert_close(plan.run({"x": rows})[0], plain.run({"x": rows})[0])


def test_a_steady_step_returns_the_same_tensors(runner: NativeRunner) -> None:
    g = writer()
    x = g.input("x", "f32", T, 32)
    plan = NativePlan(g.finish([ops.add(g, x, x)]), runner, KERNELS, {})
    rows = torch.randn(4, 32)
    (first,) = plan.run({"x": rows})
    rows += 1
    (second,) = plan.run({"x": rows})
    assert second is first
    torch.testing.assert_close(second, rows * 2)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 16), torch.zeros(3, 32).double(), torch.zeros(32, 3).t()])
def test_an_input_of_another_type_or_layout_is_an_error(runner: NativeRunner, wrong: Tensor) -> None:
    g = writer()
    x = g.input("x", "f32", T, 32)
    plan = NativePlan(g.finish([ops.add(g, x, x)]), runner, KERNELS, {})
    with pytest.raises(ValueError, match="expected "):
        plan.run({"x": wrong})
