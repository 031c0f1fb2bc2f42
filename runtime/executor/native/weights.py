"""Weights of a native plan in the forms that its kernels read: as declared, or packed.

Weights are packed once, when a model is loaded, and only the packed form is kept, so that memory holds one copy. A form
other than the one in memory is made for the plan that requires it.
"""

from collections.abc import Container, Iterable, Mapping, MutableMapping
from typing import TypeAlias

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.nodes import TensorRef
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.kernels import Kernel, NativeKernel
from sageLLM.runtime.executor.native.locations import Location, contiguous
from sageLLM.runtime.kernels.cpu.coded import CodedWeight, decoded, pack_codes, unpacked
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.kernels.cpu.native import KernelUse, NativeRunner
from sageLLM.runtime.kernels.cpu.packing import (
    PackedWeight,
    WeightMemory,
    gates_by_weight,
    pack,
    pack_away,
    release_free_memory,
)
from sageLLM.runtime.kernels.int8_activations import INT8_ACTIVATIONS, with_int8_activations

Weight: TypeAlias = Tensor | PackedWeight | CodedWeight
"""A weight; codes only until `pack_weights` or `decode_weights` has run."""

FREED_BYTES = 2**25
"""Bytes of codes after which free memory is returned to the system."""
LARGE_BYTES = 2**25
"""Bytes from which a weight returns its memory while it is packed."""
MUST_BE_PACKED = "codes must be packed or decoded before a plan binds them"


def pack_weights(
    weights: MutableMapping[str, Weight],
    ties: Mapping[str, str],
    graphs: Iterable[ExecutionGraph],
    runner: NativeRunner,
) -> None:
    """Replaces the weights that the graphs' GEMMs read by their packed form, one at a time to bound the peak memory.

    `ties` maps a tied weight to the weight that it shares. The values of large weights are lost, so `weights` must be
    the only owner. Codes that no GEMM reads stay. Raises CompileError.
    """
    memory, num_freed = WeightMemory(), 0
    for name, gates in gates_of(graphs, ties, runner).items():
        held = weights.get(name)
        if held is not None and not isinstance(held, PackedWeight):
            # All names of a tied weight must get the same packed object, or both forms would stay in memory.
            if isinstance(held, CodedWeight):
                packed = pack_codes(held, gates, memory)
            elif held.nbytes >= LARGE_BYTES and gates == 1 and held.dim() == 2 and held.is_contiguous():
                packed = pack_away(held, runner.library, memory)
            else:
                packed = pack(held, gates, runner.library, memory)
            weights.update(dict.fromkeys((name, *(tied for tied, to in ties.items() if to == name)), packed))
            num_freed += held.nbytes if isinstance(held, CodedWeight) else 0
            del held
            # Codes are in the heap, between intermediate results that were freed: it does not shrink by itself.
            if num_freed > FREED_BYTES:
                release_free_memory()
                num_freed = 0


def decode_weights(
    weights: MutableMapping[str, Weight],
    ties: Mapping[str, str],
    kernels: Mapping[str, Kernel],
    device: torch.device | None = None,
) -> None:
    """Replaces codes by float weights for the reference kernels `kernels`, on the CPU or a device, one at a time."""
    for name, held in list(weights.items()):
        if name not in ties and isinstance(held, CodedWeight):
            found = for_references(held, kernels).to(device)
            weights.update(dict.fromkeys((name, *(tied for tied, to in ties.items() if to == name)), found))


def for_references(weight: PackedWeight | CodedWeight, kernels: Mapping[str, Kernel]) -> Tensor:
    """The weight as the reference kernels read it: their products round activations as those of its kernels do."""
    values = decoded(weight, weight.dtype) if isinstance(weight, CodedWeight) else unpacked(weight)
    return values if weight.activations is None else with_int8_activations(values, kernels[INT8_ACTIVATIONS])


def uses_of(
    nodes: Iterable[object],
    kernels: Mapping[str, NativeKernel],
    weights: Mapping[str, Weight],
    packed: Container[str],
    dtype: str,
    kv_form: str | None,
) -> Iterable[KernelUse]:
    """The kernels of nodes, each once: in `dtype`, with the form of the caches, or of the codes of a packed weight.

    `packed` are the weights that are packed, or will be. Tied weights are in it under all of their names.
    """
    found: dict[KernelUse, None] = {}
    for node in nodes:
        kernel = kernels.get(node.op) if isinstance(node, OpNode) else None
        if isinstance(node, OpNode) and kernel is not None:
            refs = [ref for name in node.input_types if (ref := node.optional_input(name)) is not None]
            held = [weights.get(ref.name) for ref in refs if ref.name in packed]
            codes = [one.native for one in held if isinstance(one, PackedWeight | CodedWeight) and one.native]
            found[KernelUse(node.op, dtype, next(iter(codes), kv_form if kernel.caches else None))] = None
    return found


def gates_of(graphs: Iterable[ExecutionGraph], ties: Mapping[str, str], runner: NativeRunner) -> dict[str, int]:
    """The weights that the graphs' GEMMs read packed, each with its gates."""
    nodes = [node for graph in graphs for node in graph.nodes.values() if isinstance(node, OpNode)]
    return gates_by_weight(nodes, runner.kernels, ties)


class WeightForms:
    """A plan's weights by the names of their forms. `bound` has them in the form that the model keeps."""

    def __init__(self, bound: Mapping[str, Weight], library: Library | None) -> None:
        self._bound, self._library = bound, library
        self._forms: dict[str, Tensor | PackedWeight] = {}

    def __contains__(self, base: str) -> bool:
        return base in self._forms

    def __getitem__(self, base: str) -> Tensor | PackedWeight:
        return self._forms[base]

    def is_packed(self, name: str) -> bool:
        """Whether the model keeps the weight in packed form."""
        return isinstance(self._bound[name], PackedWeight)

    def form(self, name: str) -> str | None:
        """The native form of a weight that the model keeps as packed codes."""
        held = self._bound[name]
        return held.native if isinstance(held, PackedWeight) else None

    def location_as_held(self, ref: TensorRef) -> Location:
        """The location of the weight in the form that the model keeps."""
        return self._located(ref, f"{ref.name} as held", self._bound[ref.name])

    def location(self, ref: TensorRef, gates: int | None) -> Location:
        """The location of the weight packed with `gates` gates, or (None) in its declared form.

        Raises KeyError if the weight is not bound.
        """
        held = self._bound[ref.name]
        assert not isinstance(held, CodedWeight), MUST_BE_PACKED
        base = ref.name if gates is None else f"{ref.name} packed by {gates}"
        if base in self._forms:
            return self._located(ref, base, self._forms[base])
        if gates is None:
            return self._located(ref, base, held if isinstance(held, Tensor) else unpacked(held))
        if isinstance(held, PackedWeight):
            if held.gates == gates:
                return self._located(ref, base, held)
            held = unpacked(held)
        assert self._library is not None, "only the kernels of a library read packed weights"
        return self._located(ref, base, pack(held, gates, self._library))

    def _located(self, ref: TensorRef, base: str, weight: Weight) -> Location:
        assert not isinstance(weight, CodedWeight), MUST_BE_PACKED
        self._forms[base] = weight
        if isinstance(weight, PackedWeight):
            return contiguous(base, ref.dtype, tuple(weight.shape))
        return Location(base, ref.dtype, tuple(weight.shape), tuple(weight.stride()))
