"""Runs a model layer by layer over calibration texts, and quantises each layer for the inputs that it receives.

For each part of the graph, a layer or what precedes or follows the layers: its weights are read, the inputs of its
linear weights are summed to Hessians, the weights are quantised, and the part runs again with the quantised ones, so
that the layers after it see their errors. In memory are the weights of one part in float32, its Hessians, and the
values between two parts for all sequences. The torch references compute, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.weights import Part, WeightSpec
from sageLLM.runtime.errors import CheckpointError
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.loader.model import Model, load_model
from sageLLM.runtime.loader.open_checkpoint import open_checkpoint
from sageLLM.runtime.loader.safetensors_reader import Checkpoint
from sageLLM.runtime.loader.weights import load_weights
from sageLLM.runtime.quantize.gptq import Hessian
from sageLLM.runtime.registry.plugins import Registry
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.sequences import NO_DECODES, SequenceChunk, WorkerSequence
from sageLLM.runtime.worker.step_inputs import Inputs, StepInputs

BLOCK_SIZE = 16
"""Tokens of a KV block."""
CHUNK_LEN = 2**14
"""Characters of a calibration text that are encoded at a time."""
Quantise = Callable[[str, Hessian], Tensor]
"""Quantises the weight of a name in the checkpoint, and returns the values [N, K] of its codes."""


@dataclass(slots=True)
class _Use:
    """A weight of the graph that a node multiplies with the value `x`; `experts` are those of each token."""

    spec: WeightSpec
    x: str
    experts: str | None
    parts: list[Part]


class _Overlay(Checkpoint):
    """A checkpoint with quantised values in place of some tensors."""

    def __init__(self, stored: Checkpoint) -> None:
        self._stored = stored
        self.values: dict[str, Tensor] = {}

    def read(self, name: str, rows: slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        found = self.values[name] if name in self.values else self._stored.read(name, dtype=dtype)
        return found if rows is None else found[rows]

    def close(self) -> None:
        self._stored.close()


class Calibration:
    """The sequences of a calibration text, and a model that reads them."""

    def __init__(self, folder: Path, registry: Registry, sequences: Sequence[Sequence[int]]) -> None:
        """Raises CheckpointError for a checkpoint that cannot be loaded, or sequences that do not fit the model."""
        self.model: Model = load_model(
            folder, registry, dtype="float32", device=torch.device("cpu"), max_model_len=None, has_weights=False
        )
        self._checkpoint = open_checkpoint(folder, registry)
        self._registry = registry
        longest = max(map(len, sequences), default=0)
        if not 0 < longest <= self.model.max_model_len:
            raise CheckpointError(
                f"calibration sequences must have from 1 to {self.model.max_model_len} tokens, got {longest}"
            )
        self._sequences = sequences
        self._specs = {spec.name: spec for spec in self.model.layout.weights(self.model.config)}
        compiler = ModelCompiler(self.model.layout, self.model.config, registry, dtype="f32")
        self._graph = compiler.expanded(compiler.block_graph("prefill"))
        blocks = -(-longest // BLOCK_SIZE)
        self._inputs = StepInputs(BLOCK_SIZE, blocks, self.model.tables)
        self._values: list[dict[str, Tensor]] = [{} for _ in sequences]

    @property
    def head(self) -> str | None:
        """The name in the checkpoint of the weight of the output head, or of the tied embedding."""
        nodes = [node for node in self._graph.nodes.values() if isinstance(node, OpNode) and node.op == "lm_head"]
        specs = [self._spec(ref.name) for node in nodes for ref in node.inputs if ref.name in self._specs]
        return specs[0].parts[0].name if len(specs) == 1 and len(specs[0].parts) == 1 else None

    @torch.inference_mode()
    def run(self, chosen: frozenset[str], quantise: Quantise) -> None:
        """Calls `quantise` for those of the `chosen` weights that a node multiplies with its inputs, in their order."""
        segments = self._segments()
        for i, segment in enumerate(segments):
            part = self._graph.get_subgraph(segment)
            uses = list(self._uses(part, chosen))
            checkpoint = _Overlay(self._checkpoint)
            weights = self._weights(part, checkpoint)
            if uses:
                hessians = self._hessians(part, uses, weights)
                for use in uses:
                    for one in use.parts:
                        if one.name not in checkpoint.values:
                            checkpoint.values[one.name] = quantise(one.name, hessians[use.x, _expert(use, one)])
            if i + 1 < len(segments):
                if uses:
                    weights = self._weights(part, checkpoint)
                self._advance(part, weights, {name for later in segments[i + 1 :] for name in self._read(later)})

    def _segments(self) -> list[list[str]]:
        """The nodes before the layers, of each layer, and after them, in their order."""
        nodes = self._graph.topological_sort()
        return [[node.node_id for node in run] for _, run in groupby(nodes, key=lambda node: node.layer_id)]

    def _read(self, segment: Sequence[str]) -> set[str]:
        return {ref.name for node_id in segment for ref in self._graph.nodes[node_id].inputs}

    def _uses(self, part: ExecutionGraph, chosen: frozenset[str]) -> Iterator[_Use]:
        for node in part.topological_sort():
            assert isinstance(node, OpNode), f"{node.node_id} is a block, and the graph is expanded"
            x, experts = _operand(node, "x"), _operand(node, "experts")
            for spec in (self._spec(ref.name) for ref in node.inputs if ref.name in self._specs):
                parts = [one for one in spec.parts if one.name in chosen and _is_whole(spec, one)]
                if x is not None and parts:
                    yield _Use(spec, x, experts, parts)

    def _spec(self, name: str) -> WeightSpec:
        """A weight of the graph, or the one that it is tied to."""
        spec = self._specs[name]
        return spec if spec.tied_to is None else self._specs[spec.tied_to]

    def _weights(self, part: ExecutionGraph, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The weights of a part; a tied one is read as the other."""
        specs = {name: self._spec(name) for name in part.weights}
        found = load_weights(specs.values(), checkpoint, torch.float32, torch.device("cpu"))
        return {name: found[spec.name] for name, spec in specs.items()}

    def _hessians(
        self, part: ExecutionGraph, uses: Sequence[_Use], weights: Mapping[str, Tensor]
    ) -> dict[tuple[str, int | None], Hessian]:
        """The Hessians of the inputs by their name, and for experts by the expert."""
        names = list(dict.fromkeys(name for use in uses for name in (use.x, use.experts) if name is not None))
        observed = _with_outputs(part, names)
        keys = {(use.x, use.experts, _expert(use, one), one.shape[1]) for use in uses for one in use.parts}
        found = {(x, expert): Hessian(width) for x, _, expert, width in keys}
        for values in self._run(observed, weights):
            for x, experts, expert, width in keys:
                rows = values[x]
                if experts is not None and expert is not None:
                    is_own = values[experts] == expert
                    rows = rows[is_own] if rows.dim() == 3 else rows[is_own.any(-1)]
                found[x, expert].add(rows.reshape(-1, width))
        return found

    def _advance(self, part: ExecutionGraph, weights: Mapping[str, Tensor], needed: set[str]) -> None:
        """Computes the values of the part that later ones need, and drops those that none needs."""
        names = [ref.name for node in part.topological_sort() for ref in node.outputs if ref.name in needed]
        for own, values in zip(self._values, self._run(_with_outputs(part, names), weights), strict=True):
            own |= values
            for name in own.keys() - needed:
                del own[name]

    def _run(self, graph: ExecutionGraph, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The outputs by name, for one sequence after another."""
        pool = self._pool(graph)
        bound = {name: weights[name] for name in graph.weights} | self.model.tables.tensors
        bound |= {} if pool is None else pool.named_tensors()
        plan = Plan(graph, self._registry.kernels, {name: one for name, one in bound.items() if _reads(graph, name)})
        names = [ref.name for ref in graph.outputs]
        for sequence, values in zip(self._sequences, self._values, strict=True):
            outputs = plan.run({**self._step(sequence), **values})
            yield dict(zip(names, (one.clone() for one in outputs), strict=True))

    def _step(self, sequence: Sequence[int]) -> Inputs:
        """The inputs of a step with one sequence; logits would be those of its last token."""
        blocks = list(range(-(-len(sequence) // BLOCK_SIZE)))
        chunk = SequenceChunk(WorkerSequence("0", list(sequence), block_ids=blocks), 0, len(sequence))
        inputs = self._inputs.make(NO_DECODES, [chunk], range(len(sequence)))
        return {**inputs, "type_ids": torch.zeros(len(sequence), dtype=torch.int32)}

    def _pool(self, graph: ExecutionGraph) -> KVPool | None:
        """Memory for the keys and values of the one layer of a part, if it has a cache."""
        layers = sorted({node.layer_id for node in graph.nodes.values() if node.layer_id is not None})
        if "decode" not in self.model.layout.phases or not layers:
            return None
        num_blocks = -(-max(map(len, self._sequences)) // BLOCK_SIZE)
        shape = self.model.layout.cache(self.model.config)
        return KVPool(1, num_blocks, BLOCK_SIZE, shape, torch.float32, torch.device("cpu"), None, layers[0])


def sequences_of(text: str, encode: Callable[[str], Sequence[int]], length: int, count: int) -> list[list[int]]:
    """Up to `count` sequences of `length` tokens, evenly distributed over the text; a short text is one sequence."""
    pieces = (text[start : start + CHUNK_LEN] for start in range(0, len(text), CHUNK_LEN))
    tokens = [token for piece in pieces for token in encode(piece)]
    num_whole = len(tokens) // length
    if num_whole == 0:
        return [tokens] if tokens else []
    chosen = min(count, num_whole)
    starts = [i * num_whole // chosen * length for i in range(chosen)]
    return [tokens[start : start + length] for start in starts]


def _is_whole(spec: WeightSpec, part: Part) -> bool:
    """Whether the inputs of the tensor [N, K] are those of the weight, in their order."""
    if len(part.shape) != 2 or part.shape[1] != spec.shape[-1] or part.is_either:
        return False
    view = part.view
    return view is None or (
        view.axes[-1] == part.shape[1] and view.order[-1] == len(view.axes) - 1 and view.size[-1] == part.shape[1]
    )


def _operand(node: OpNode, name: str) -> str | None:
    """The value of an operand, if the op has it and it is present."""
    ref = node.optional_input(name) if name in node.input_types else None
    return None if ref is None else ref.name


def _expert(use: _Use, part: Part) -> int | None:
    return part.region(len(use.spec.shape))[0][0] if use.experts is not None else None


def _reads(graph: ExecutionGraph, name: str) -> bool:
    return name in graph.weights or name in graph.inputs


def _with_outputs(graph: ExecutionGraph, names: Sequence[str]) -> ExecutionGraph:
    """The nodes that these values depend on, with the values as outputs."""
    inside = [name for name in names if graph.producer(name) is not None]
    needed: set[str] = set()
    pending = [node for name in inside if (node := graph.producer(name)) is not None]
    while pending:
        node = pending.pop()
        if node.node_id not in needed:
            needed.add(node.node_id)
            pending += [one for ref in node.inputs if (one := graph.producer(ref)) is not None]
            pending += [graph.nodes[name] for name in node.dependencies if name in graph.nodes]
    refs = {ref.name: ref for node in graph.nodes.values() for ref in (*node.inputs, *node.outputs)}
    found = graph.get_subgraph(needed)
    found.outputs = [refs[name] for name in names]
    found.inputs |= {name: refs[name] for name in names if name not in inside}
    return found
