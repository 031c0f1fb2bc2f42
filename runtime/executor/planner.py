"""Planners bind kernel graphs to kernels, and fall back to the torch references where kernels cannot be built."""

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.core.model.kv_form import KvForm
from sageLLM.runtime.executor.cuda_graphs import DeviceBuffers, DevicePlan, GraphedPlan
from sageLLM.runtime.executor.device_api import DeviceApi
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.executor.native.recorder import StepRecorder
from sageLLM.runtime.executor.native.weights import (
    Weight,
    decode_weights,
    for_references,
    gates_of,
    pack_weights,
    uses_of,
)
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.kernels.coded_tensor import coded_tensor
from sageLLM.runtime.kernels.cpu.coded import CodedWeight
from sageLLM.runtime.kernels.cpu.compiler import CompileError
from sageLLM.runtime.kernels.cpu.library import ELEMENTS
from sageLLM.runtime.kernels.cpu.native import NativeRunner
from sageLLM.runtime.kernels.cpu.packing import PackedWeight, pack
from sageLLM.runtime.kernels.triton import why_references

KernelChoice: TypeAlias = Literal["auto", "reference", "cpu", "triton"]
KERNEL_CHOICES: tuple[KernelChoice, ...] = ("auto", "reference", "cpu", "triton")
LOG = logging.getLogger("sagellm")


class Runnable(Protocol):
    """A graph ready to run."""

    graph: ExecutionGraph

    def run(self, inputs: Mapping[str, Tensor | None]) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class KernelStats:
    """The kernels of a graph: the number of native calls, and the Python calls by op with their number and reason."""

    graph: str
    num_native: int
    in_python: Mapping[str, tuple[int, str]] = field(default_factory=dict)


class Planner(Protocol):
    """Binds graphs to kernels. Plans that share an arena must run one after another.

    `device` is the GPU that the plans copy their inputs to, if they run on one. A planner that `captures` requires
    decode steps that are padded to `Buckets`.
    """

    name: str
    stats: list[KernelStats]
    device: DeviceApi | None
    captures: bool

    def prepare_weights(
        self, weights: MutableMapping[str, Weight], ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]
    ) -> None:
        """Replaces a model's weights by the form that the kernels of these graphs read."""

    def gemm_kernels(self, forms: Iterable[str | None]) -> Mapping[str | None, str]:
        """The kernels of GEMMs by the native form of codes; None for floats."""

    def gates(self, ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]) -> Mapping[str, int]:
        """The gates of the weights that the kernels of these graphs read packed, if they can be built."""

    def packed_gates(self, ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]) -> Mapping[str, int]:
        """The same with the kernels built, or no gates if they cannot be."""

    def pack(self, weight: Tensor, gates: int) -> PackedWeight:
        """A packed copy of a weight, if `packed_gates` named any."""

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Runnable: ...


class TorchPlanner:
    """Plans of torch callables, called from Python: the references, or launchers of GPU kernels.

    On a GPU (`device`) the plans have the streams of their graphs, and share the memory of their inputs. With
    `captures` the plans of decode steps record CUDA graphs.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        name: str = "reference",
        device: DeviceApi | None = None,
        *,
        captures: bool = False,
    ) -> None:
        self.name = name
        self.stats: list[KernelStats] = []
        self.device, self.captures = device, captures
        self._kernels = kernels
        # Made with the first plan: the engine of worker processes plans nothing and uses no memory of the GPU.
        self._buffers: DeviceBuffers | None = None

    def prepare_weights(
        self, weights: MutableMapping[str, Weight], ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]
    ) -> None:
        """Decodes codes: torch reads weights in their declared form."""
        decode_weights(weights, ties, self._kernels)

    def gemm_kernels(self, forms: Iterable[str | None]) -> Mapping[str | None, str]:
        return {}

    def gates(self, ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]) -> Mapping[str, int]:
        return {}

    def packed_gates(self, ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]) -> Mapping[str, int]:
        return {}

    def pack(self, weight: Tensor, gates: int) -> PackedWeight:
        raise AssertionError("torch reads weights in their declared form")

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Plan:
        ops = Counter(node.op for node in graph.nodes.values())
        references = why_references(graph) if self.name == "triton" else {}
        in_python = {op: (count, references.get(op, self.name)) for op, count in ops.items()}
        self.stats.append(KernelStats(graph.graph_id, 0, in_python))
        tensors = {name: x for name, x in bound.items() if isinstance(x, Tensor)}
        if self.device is None:
            return Plan(graph, self._kernels, tensors)
        self._buffers = self._buffers or DeviceBuffers(self.device)
        # Micro-batches have inputs of their own, for which steps are not padded to buckets.
        is_captured = self.captures and graph.stage == "decode" and "block_table" in graph.inputs
        if references:  # those of attention read lengths, which a capture does not allow
            LOG.warning("%s runs without CUDA graphs: %s", graph.graph_id, "; ".join(references.values()))
            is_captured = False
        make = GraphedPlan if is_captured else DevicePlan
        return make(graph, self._kernels, tensors, self._buffers)


class TritonPlanner(TorchPlanner):
    """Plans of Triton launchers on `place`, a GPU, or the CPU of the interpreter. Weights of codes stay codes.

    `coded` are the operands, by op, that launchers read as codes.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        coded: Mapping[str, str],
        place: torch.device,
        device: DeviceApi | None = None,
        *,
        captures: bool = False,
    ) -> None:
        super().__init__(kernels, "triton", device, captures=captures)
        self._coded, self._place = coded, place

    def prepare_weights(
        self, weights: MutableMapping[str, Weight], ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]
    ) -> None:
        """Moves weights of codes to the device, decoded if an op besides the GEMMs reads them."""
        others = self._read_as_floats(ties, graphs)
        for name, held in list(weights.items()):
            if isinstance(held, CodedWeight) and name not in ties and name not in others:
                found = coded_tensor(held, self._place)
                weights.update(dict.fromkeys((name, *(tied for tied, to in ties.items() if to == name)), found))
        decode_weights(weights, ties, self._kernels, self._place)

    def gemm_kernels(self, forms: Iterable[str | None]) -> Mapping[str | None, str]:
        return {form: "Triton, decoded in registers" for form in forms if form is not None}

    def _read_as_floats(self, ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]) -> set[str]:
        nodes = [node for graph in graphs for node in graph.nodes.values() if isinstance(node, OpNode)]
        reads = [(node, name, node.optional_input(name)) for node in nodes for name in node.input_types]
        return {
            ties.get(ref.name, ref.name)
            for node, name, ref in reads
            if ref is not None and self._coded.get(node.op) != name
        }


class NativePlanner:
    """Plans of native kernels on the CPU.

    If the kernels cannot be built or loaded, one warning is logged and further plans run on the `reference` kernels.
    """

    name = "cpu"
    device: DeviceApi | None = None
    captures = False

    def __init__(
        self,
        make_runner: Callable[[], NativeRunner],
        reference: Mapping[str, Kernel],
        dtype: str,
        kv_form: KvForm | None = None,
    ) -> None:
        """`kv_form` is the form of the caches that plans bind."""
        self._kv_form = None if kv_form is None else kv_form.native
        self.stats: list[KernelStats] = []
        self.recorder = StepRecorder()
        self._make_runner, self._kernels, self._dtype = make_runner, reference, dtype
        self._runner: NativeRunner | None = None
        self._fallback: TorchPlanner | None = None

    def prepare_weights(
        self, weights: MutableMapping[str, Weight], ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]
    ) -> None:
        """Builds the kernels of the graphs, then packs the weights.

        The order matters: a compiler that fails must leave the weights in the form that the references read.
        """
        if self._fallback is None:
            try:
                gates = gates_of(graphs, ties, self._found_runner())
                packed = {*gates, *(name for name, to in ties.items() if to in gates)}
                pack_weights(weights, ties, graphs, self._built_runner(graphs, weights, packed))
            except CompileError as error:
                self._fall_back(error)
        decode_weights(weights, ties, self._kernels)

    def gemm_kernels(self, forms: Iterable[str | None]) -> Mapping[str | None, str]:
        if self._runner is None or self._fallback is not None or self._dtype not in ELEMENTS:
            return {}
        library = self._runner.library
        return {form: f"C++, {library.microkernel('linear', self._dtype, form)}" for form in forms}

    def gates(self, ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]) -> Mapping[str, int]:
        return gates_of(graphs, ties, self._found_runner()) if self._fallback is None else {}

    def packed_gates(self, ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]) -> Mapping[str, int]:
        if self._fallback is None:
            try:
                return gates_of(graphs, ties, self._built_runner(graphs, {}, ()))
            except CompileError as error:
                self._fall_back(error)
        return {}

    def pack(self, weight: Tensor, gates: int) -> PackedWeight:
        assert self._runner is not None, "packed_gates must come first"
        return pack(weight, gates, self._runner.library)

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Runnable:
        if self._fallback is None:
            try:
                return self._native_plan(graph, bound, arena)
            except CompileError as error:
                self._fall_back(error)
        assert self._fallback is not None, "_fall_back sets the fallback planner"
        # The weights are packed already if the first kernel that fails belongs to a graph made after loading.
        packed = {name: x for name in graph.weights if isinstance(x := bound[name], PackedWeight)}
        return self._fallback.plan(
            graph, {**bound, **{name: for_references(x, self._kernels) for name, x in packed.items()}}
        )

    def _fall_back(self, error: CompileError) -> None:
        LOG.warning("the slower torch references run instead of the CPU kernels: %s", error)
        self._fallback = TorchPlanner(self._kernels)
        # The statistics list is shared: plans made before the failure keep their entries.
        self._fallback.stats, self.name = self.stats, self._fallback.name

    def _found_runner(self) -> NativeRunner:
        if self._runner is None:
            self._runner = self._make_runner()
        return self._runner

    def _built_runner(
        self, graphs: Iterable[ExecutionGraph], weights: Mapping[str, Weight], packed: Container[str]
    ) -> NativeRunner:
        """The runner, with the kernels of these graphs built for the weights; `packed` are or will be packed."""
        runner = self._found_runner()
        nodes = (node for graph in graphs for node in graph.nodes.values())
        runner.prepare(uses_of(nodes, runner.kernels, weights, packed, self._dtype, self._kv_form))
        return runner

    def _native_plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None) -> NativePlan:
        packed = {name for name, weight in bound.items() if isinstance(weight, PackedWeight)}
        runner = self._built_runner([graph], bound, packed)
        plan = NativePlan(graph, runner, self._kernels, bound, arena, recorder=self.recorder)
        self.stats.append(KernelStats(graph.graph_id, plan.num_native_calls, plan.python_calls))
        return plan
