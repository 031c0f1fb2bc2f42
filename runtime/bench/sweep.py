"""Measures the model's kernels on this machine: single calls in steps of two synthetic models, by kernel family.

The models have weights of several times the last-level cache, which a step reads from memory, as a whole model does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.dims import evaluate
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import Stage
from sageLLM.runtime.executor.native.calls import number_of
from sageLLM.runtime.executor.native.plan import NativePlan
from sageLLM.runtime.loader.model import DTYPES, Model
from sageLLM.runtime.loader.tables import PositionTables
from sageLLM.runtime.registry.plugins import Registry
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork
from sageLLM.runtime.sim.calibration.kernel_times import Measured, Row
from sageLLM.runtime.worker.build import make_compiler
from sageLLM.runtime.worker.kv_pool import make_pool
from sageLLM.runtime.worker.model_runner import ModelRunner
from sageLLM.runtime.worker.sequences import DecodeBatch, SequenceChunk, WorkerSequence

BLOCK_SIZE = 16
NUM_BLOCKS = 1024
MAX_LEN = 4096
VOCAB = 32768
COMMON = {"vocab_size": VOCAB, "max_position_embeddings": MAX_LEN, "rms_norm_eps": 1e-6}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "hidden_size": 576,
        "num_hidden_layers": 12,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
    },
    "qwen3": {
        "hidden_size": 1024,
        "num_hidden_layers": 5,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
}
"""Layouts and their sizes: layers of SmolLM-135M and Qwen3-0.6B, fewer of them, with a smaller vocabulary."""


def decodes(num: int, context: int) -> StepWork:
    """A step of decodes with equal contexts."""
    return StepWork((), num, num * context)


def prompt(num_tokens: int, start: int = 0, num_decodes: int = 0, context: int = 0) -> StepWork:
    """A step with a chunk of a prompt, next to decodes."""
    return StepWork((PromptChunk(start, num_tokens),), num_decodes, num_decodes * context)


STEPS = (
    *(decodes(num, 256) for num in (2, 4, 8, 32)),
    *(decodes(num, context) for num, context in ((1, 64), (1, 512), (1, 2048), (8, 1024))),
    *(decodes(num, context) for num, context in ((16, 128), (16, 768), (64, 128))),
    *(prompt(num) for num in (16, 64, 128, 256, 512, 1024, 2048)),
    *(prompt(num, start) for num, start in ((128, 1024), (512, 1024))),
    *(prompt(num, 0, n, context) for num, n, context in ((128, 4, 256), (256, 16, 256), (512, 8, 512), (512, 32, 128))),
)  # fmt: skip
"""Sizes between and around those of common steps."""


@dataclass(frozen=True, slots=True)
class Call:
    """One native call of a step: its node, and the shortest of its times in seconds."""

    node: OpNode
    seconds: float


def measure_kernels(registry: Registry, dtype: str, runs: int = 3, steps: Sequence[StepWork] = STEPS) -> Measured:
    """The times of all kernels in `steps` of each of MODELS; the shortest of `runs` counts."""
    measured = Measured()
    for name in MODELS:
        model = SweepModel(registry, name, dtype)
        for work in steps:
            for family, row in model.rows(work, runs):
                measured.add(family, row)
    return measured


class SweepModel:
    """A model of random weights without a checkpoint, and a KV pool."""

    def __init__(self, registry: Registry, name: str, dtype: str) -> None:
        layout = registry.models[name]
        config = layout.read_config(HFConfig({**COMMON, **MODELS[name]}, f"{name} of the sweep"))
        device, kind = torch.device("cpu"), DTYPES[dtype]
        model = Model(layout, config, kind, device, MAX_LEN, {}, PositionTables(config, MAX_LEN, device))
        self._compiler = make_compiler(model, registry, "cpu", [])
        torch.manual_seed(0)
        graphs = [self._compiler.kernel_graph(stage) for stage in layout.phases]
        for graph in graphs:
            for weight in graph.weights.values():
                if weight.name not in model.weights:
                    shape = [number_of(size, {}) for size in weight.shape]
                    model.weights[weight.name] = torch.empty(shape, dtype=kind).normal_(std=0.02)
        self._compiler.planner.prepare_weights(model.weights, model.ties, graphs)
        self._runner = ModelRunner(model, make_pool(model, NUM_BLOCKS, BLOCK_SIZE), self._compiler)
        self.config = config

    def rows(self, work: StepWork, runs: int) -> Iterator[tuple[str, Row]]:
        """Families and rows of the step's distinct kernels; a kernel of each layer takes the median over the layers."""
        times: dict[tuple[str, float, float], list[Call]] = {}
        for call in self.calls(work, runs):
            times.setdefault((call.node.op, *work_of(call.node, sizes_of(work, self.config))), []).append(call)
        for (op, flops, num_bytes), calls in times.items():
            node = calls[0].node
            seconds = sorted(call.seconds for call in calls)[len(calls) // 2]
            if "attention" in node.tags:
                yield attention_row(node, work, self.config, seconds)
                continue
            row = Row(flops, num_bytes, seconds)
            yield op, row
            yield "gemm" if "gemm" in node.tags else "default", row

    @torch.inference_mode()
    def calls(self, work: StepWork, runs: int) -> list[Call]:
        """Every native call of the step, in order."""
        plan = self._runner.plan(stage_of(work))
        assert isinstance(plan, NativePlan), "the kernels cannot be compiled here; see the warning in the log"
        inputs = self._inputs(work)
        shortest: dict[str, float] = {}
        for _ in range(runs):
            for time in plan.time_calls(inputs):
                shortest[time.node_id] = min(time.seconds, shortest.get(time.node_id, time.seconds))
        nodes = (plan.graph.nodes.get(node_id) for node_id in shortest)
        return [
            Call(node, seconds)
            for node, seconds in zip(nodes, shortest.values(), strict=True)
            if isinstance(node, OpNode)  # a copy is no node of the graph
        ]

    def _inputs(self, work: StepWork) -> dict[str, Tensor | None]:
        """The inputs of a step, with sequences in separate blocks as far as the pool has room."""
        sequences, next_block = [], 0
        per_decode = work.num_context_tokens // max(work.num_decodes, 1)
        lengths = [per_decode] * work.num_decodes + [start + count for start, count in work.prefill]
        for number, length in enumerate(lengths):
            num_blocks = -(-length // BLOCK_SIZE)
            blocks = [(next_block + i) % NUM_BLOCKS for i in range(num_blocks)]
            next_block += num_blocks
            ids = [(7 * i + number) % VOCAB for i in range(length)]
            sequences.append(WorkerSequence(str(number), ids, [], blocks))
        running, prompts = sequences[: work.num_decodes], sequences[work.num_decodes :]
        chunks = [SequenceChunk(one, *chunk) for one, chunk in zip(prompts, work.prefill, strict=True)]
        rows = list(range(len(running)))
        for chunk in chunks:
            rows.append((rows[-1] if rows else -1) + chunk.num_tokens)
        return self._runner.step_inputs.make(DecodeBatch(running), chunks, rows)


def stage_of(work: StepWork) -> Stage:
    """The graph that runs this step."""
    if not work.prefill:
        return "decode"
    return "hybrid" if work.num_decodes else "prefill"


def sizes_of(work: StepWork, config: Any) -> dict[str, int]:
    """The symbolic sizes of the step's graph."""
    cached = work.num_context_tokens + sum(start + count for start, count in work.prefill)
    pairs = work.num_context_tokens + sum(n * start + n * (n + 1) // 2 for start, n in work.prefill)
    sequences = work.num_decodes + len(work.prefill)
    return {
        "T": work.num_tokens, "Td": work.num_decodes, "Tp": work.num_prompt_tokens, "B": sequences, "S": sequences,
        "KV": cached, "KVd": work.num_context_tokens, "QK": pairs, "EX": 0, "V": config.V,
        "PG": NUM_BLOCKS, "BS": BLOCK_SIZE, "MB": MAX_LEN // BLOCK_SIZE, "P": MAX_LEN,
    }  # fmt: skip


def work_of(node: OpNode, sizes: Mapping[str, int]) -> tuple[float, float]:
    """Operations and bytes of a node."""
    flops, num_bytes = (evaluate(value, sizes) for value in (node.flops(sizes), node.bytes_moved(sizes)))
    assert isinstance(flops, int) and isinstance(num_bytes, int), f"{node.node_id} has a size that is not known"
    return flops, num_bytes


def attention_row(node: OpNode, work: StepWork, config: Any, seconds: float) -> tuple[str, Row]:
    """Attention by the phases of the step, as `StepTables` looks it up."""
    prompts = StepWork(work.prefill)
    running = StepWork((), work.num_decodes, work.num_context_tokens)
    own = work_of(node, sizes_of(running if work.num_decodes else prompts, config))
    context = max([work.num_context_tokens // max(work.num_decodes, 1), *(start + n for start, n in work.prefill)])
    if not work.prefill:
        return "decode_attn", Row(*own, seconds, work.num_decodes, context)
    if not work.num_decodes:
        return "prefill_attn", Row(*own, seconds, context=context)
    return "mixed_attn", Row(*own, seconds, work.num_decodes, context, *work_of(node, sizes_of(prompts, config)))
