"""Makes plans of kernel graphs: on which kernels a model runs, and what is said where they are not those asked for."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.executor.native.arena import Arena
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.executor.native.weights import Weight, pack_weights
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.kernels.cpu.compiler import CompileError
from sageLLM.runtime.kernels.cpu.native import NativeRunner

KernelChoice: TypeAlias = Literal["auto", "reference", "cpu", "triton"]
KERNEL_CHOICES: tuple[KernelChoice, ...] = ("auto", "reference", "cpu", "triton")
LOG = logging.getLogger("sagellm")


class Runnable(Protocol):
    """A graph ready to run."""

    graph: ExecutionGraph

    def run(self, inputs: Mapping[str, Tensor | None]) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class KernelStats:
    """What a graph runs on: calls of native kernels, and calls in Python by op, with the reason why."""

    graph: str
    num_native: int
    in_python: Mapping[str, tuple[int, str]] = field(default_factory=dict)


class Planner(Protocol):
    """Binds graphs to kernels. Plans that share an arena run one after another."""

    name: str
    stats: list[KernelStats]

    def hold(
        self, weights: MutableMapping[str, Weight], ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]
    ) -> None:
        """Brings a model's weights into the form that the kernels of these graphs read, in place of the one given."""

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Runnable: ...


class TorchPlanner:
    """Every kernel is a torch callable, called from Python: the references, or launchers of GPU kernels."""

    def __init__(self, kernels: Mapping[str, Kernel], name: str = "reference") -> None:
        self.name = name
        self.stats: list[KernelStats] = []
        self._kernels = kernels

    def hold(
        self, weights: MutableMapping[str, Weight], ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]
    ) -> None:
        """Torch reads weights as they are."""

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Plan:
        ops = Counter(node.op for node in graph.nodes.values())
        in_python = {op: (count, self.name) for op, count in ops.items()}
        self.stats.append(KernelStats(graph.graph_id, 0, in_python))
        return Plan(graph, self._kernels, {name: x for name, x in bound.items() if isinstance(x, Tensor)})


class NativePlanner:
    """Native kernels on the CPU. Where they cannot be built, `reference` plans instead, which is said once."""

    name = "cpu"

    def __init__(self, make_runner: Callable[[], NativeRunner], reference: Mapping[str, Kernel], dtype: str) -> None:
        self.stats: list[KernelStats] = []
        self._make_runner, self._kernels, self._dtype = make_runner, reference, dtype
        self._runner: NativeRunner | None = None
        self._instead: TorchPlanner | None = None

    def hold(
        self, weights: MutableMapping[str, Weight], ties: Mapping[str, str], graphs: Sequence[ExecutionGraph]
    ) -> None:
        """Builds all that the graphs need, then packs the weights."""
        try:
            runner = self._ready_runner(node.op for graph in graphs for node in graph.nodes.values())
            pack_weights(weights, ties, graphs, runner)
        except CompileError as error:
            self._give_up(error)

    def plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None = None) -> Runnable:
        if self._instead is None:
            try:
                return self._native_plan(graph, bound, arena)
            except CompileError as error:
                self._give_up(error)
        assert self._instead is not None, "it has just been given up"
        return self._instead.plan(graph, bound)

    def _give_up(self, error: CompileError) -> None:
        LOG.warning("the CPU kernels are not used, the slower torch references are: %s", error)
        self._instead = TorchPlanner(self._kernels)
        self._instead.stats, self.name = self.stats, self._instead.name

    def _ready_runner(self, ops: Iterable[str]) -> NativeRunner:
        """The runner, with everything built that the ops need."""
        if self._runner is None:
            self._runner = self._make_runner()
        self._runner.prepare(dict.fromkeys(ops), self._dtype)
        return self._runner

    def _native_plan(self, graph: ExecutionGraph, bound: Mapping[str, Weight], arena: Arena | None) -> NativePlan:
        runner = self._ready_runner(node.op for node in graph.nodes.values())
        plan = NativePlan(graph, runner, self._kernels, bound, arena)
        self.stats.append(KernelStats(graph.graph_id, plan.num_native_calls, plan.python_calls))
        return plan
