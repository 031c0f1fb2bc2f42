"""Selects the planner for `LLM(kernels=...)`: the generated kernels of the device, or the torch references."""

from collections.abc import Mapping
from pathlib import Path

import torch

from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.kv_form import KvForm
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor import red_zones
from sageLLM.runtime.executor.device_api import CudaApi
from sageLLM.runtime.executor.planner import KERNEL_CHOICES, NativePlanner, Planner, TorchPlanner, TritonPlanner
from sageLLM.runtime.kernels.cpu.callables import NativeCallable
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.kernels.cpu.native import NativeRunner
from sageLLM.runtime.kernels.triton import why_no_triton
from sageLLM.runtime.registry.plugins import Registry
from sageLLM.runtime.registry.trees import native_tables, triton_coded, triton_table


def choose_planner(
    choice: str,
    registry: Registry,
    device: torch.device,
    dtype: str,
    overrides: Mapping[str, Kernel] | None = None,
    *,
    captures: bool = True,
    kv_form: KvForm | None = None,
    activations: str | None = None,
) -> Planner:
    """The planner for a choice of KERNEL_CHOICES; `auto` selects the best kernels of the device.

    `overrides` take the place of reference kernels. Triton kernels are captured in CUDA graphs if `captures`. Raises
    SageError for a choice that is unknown, or that the device or the type of `activations` does not allow.
    """
    if choice not in KERNEL_CHOICES:
        raise SageError(f"kernels must be one of {', '.join(KERNEL_CHOICES)}, got {shown(choice)}")
    references = {**registry.kernels, **(overrides or {})}
    if choice == "triton" and (why_not := why_no_triton(device)):
        raise SageError(f"kernels must not be 'triton' here: {why_not}; use auto")
    gpu = CudaApi() if device.type == "cuda" else None
    is_checked = red_zones.is_enabled()
    if uses_triton(choice, device):
        if activations is not None:
            raise SageError(
                f"activation_dtype must be 'auto' with Triton kernels, got {activations!r}; or use kernels='cpu'"
            )
        kernels = {**references, **triton_table(registry.packages)}
        if is_checked:
            return TorchPlanner(red_zones.checked(kernels, registry.ops), "triton", gpu)
        coded = triton_coded(registry.packages)
        return TritonPlanner(kernels, coded, device, gpu, captures=captures and gpu is not None)
    if choice == "cpu" and device.type != "cpu":
        raise SageError(f"kernels 'cpu' requires device 'cpu', got {device.type!r}; use auto")
    if choice == "reference" or device.type != "cpu":
        return TorchPlanner(references, device=gpu)
    if is_checked:
        return TorchPlanner(red_zones.checked({**references, **native_callables(registry)}, registry.ops), "cpu")
    # The runner is made on first use: finding a compiler takes time, and a model may need no native kernel.
    return NativePlanner(lambda: make_runner(registry), references, dtype, kv_form)


def native_callables(registry: Registry) -> dict[str, Kernel]:
    """The native kernels as torch callables."""
    compiler = find_compiler()
    found: dict[str, Kernel] = {}
    for folder, kernels in native_tables(registry.packages):
        library = Library(kernels, Path(folder), compiler)
        found |= {op: NativeCallable(kernel, library, registry.kernels[op]) for op, kernel in kernels.items()}
    return found


def uses_triton(choice: str, device: torch.device) -> bool:
    """Whether the planner of a choice has Triton's kernels."""
    return choice == "triton" or (choice == "auto" and device.type == "cuda" and why_no_triton(device) is None)


def reads_codes(choice: str, device: torch.device) -> bool:
    """Whether the planner of a choice has kernels for weights of small codes."""
    if uses_triton(choice, device):
        return not red_zones.is_enabled()
    return device.type == "cpu" and choice in ("auto", "cpu")


def make_runner(registry: Registry) -> NativeRunner:
    """The runner of the native kernels of the package and of plugins.

    Raises CompileError without a compiler, unless the kernels are cached.
    """
    compiler = find_compiler()
    tables = native_tables(registry.packages)
    return NativeRunner([Library(kernels, Path(folder), compiler) for folder, kernels in tables], compiler)
