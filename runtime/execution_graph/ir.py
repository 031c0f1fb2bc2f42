"""Public names of the execution graph's types, for backends, schedulers and benchmarks."""

from __future__ import annotations

from sageLLM.generated.ops.op_types import OpType
from sageLLM.runtime.core.errors import CycleError, IRError, VerifyError
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import ExecutionNode, TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode

__all__ = [
    "CycleError",
    "ExecutionGraph",
    "ExecutionNode",
    "IRError",
    "OpNode",
    "OpType",
    "TensorRef",
    "VerifyError",
]
