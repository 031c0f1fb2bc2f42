"""Requirements of the Triton kernels. Importing this module does not import Triton."""

import os
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from sageLLM.runtime.core.ir.dims import Dim, evaluate
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.ir.types import DTYPES


def why_no_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on the device, or None. On a CPU they run in Triton's interpreter, for tests."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'sagellm[gpu]'"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels require a GPU; to interpret them on a CPU, which is slow, set TRITON_INTERPRET=1"
    return None


def why_references(graph: ExecutionGraph, target: str | None = None) -> dict[str, str]:
    """The ops of a graph whose launchers run references on a target, by default that of the current device, and why.

    It depends on element types and sizes of the model, so it is known before the first step.
    """
    from sageLLM.generated.kernels.triton import TEMPLATES
    from sageLLM.generated.kernels.triton.targets import current_target, why_reference

    found = {}
    for node in graph.nodes.values():
        if not isinstance(node, OpNode) or node.op not in TEMPLATES:
            continue
        dims = node.dims()
        sizes = {name: size for name, size in dims.items() if isinstance(size, int) and name in ("D", "Dv")}
        sizes["E"] = DTYPES[str(dims.get("E", "f32"))]
        if reason := why_reference(target or current_target(), TEMPLATES[node.op], sizes):
            found[node.op] = f"{node.op} runs its reference: {reason}"
    return found


def workspace_bytes(graph: ExecutionGraph, sizes: Mapping[str, Dim]) -> int:
    """The memory that the largest launch of attention in a graph has for the results of parts of sequences."""
    from sageLLM.generated.kernels.triton import TEMPLATES
    from sageLLM.generated.kernels.triton.heads import DecodePlan
    from sageLLM.generated.kernels.triton.targets import choose

    found = 0
    for node in graph.nodes.values():
        if not isinstance(node, OpNode) or TEMPLATES.get(node.op) not in ("paged_decode", "paged_prefill"):
            continue
        dims = node.dims()
        B, Nq, Nkv, D, Dv, MB, BS = (_bound(dims[name], sizes) for name in ("B", "Nq", "Nkv", "D", "Dv", "MB", "BS"))
        use = choose("paged_decode", E=DTYPES[str(dims["E"])], D=D, Dv=Dv, G=Nq // Nkv)
        if use is not None:
            found = max(found, DecodePlan.of(use, B, Nq, Nkv, D, Dv, MB * BS).part_bytes(B))
    return found


def _bound(dim: Dim | str, sizes: Mapping[str, Dim]) -> int:
    value = dim if isinstance(dim, str) else evaluate(dim, sizes)
    assert isinstance(value, int), f"the sizes of the largest step must bind {dim}"
    return value
