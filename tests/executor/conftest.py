"""Fixtures: a layout's tiny model with random weights, its KV pool, and steps to run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.core.model.layout import ModelLayout, Stage
from sageLLM.runtime.executor.kernel_choice import make_runner
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.kernels.cpu.native import NativeRunner
from sageLLM.runtime.loader.tables import PositionTables
from sageLLM.runtime.registry.plugins import Registry, load_registry
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.sequences import NO_DECODES, DecodeBatch, SequenceChunk, WorkerSequence
from sageLLM.runtime.worker.step_inputs import Inputs, StepInputs

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}
BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 4, 12, 48


@dataclass
class TinyModel:
    """A tiny model; each `bound()` returns the same random weights and new copies of the same random caches."""

    layout: ModelLayout
    config: Any
    dtype: str
    compiler: ModelCompiler
    weights: dict[str, Tensor]
    tables: PositionTables

    def bound(self) -> dict[str, Tensor]:
        dtype = DTYPES[self.dtype]
        pool = KVPool(self.config.L, NUM_BLOCKS, BLOCK_SIZE, self.layout.cache(self.config), dtype, torch.device("cpu"))
        generator = torch.Generator().manual_seed(1)
        for _, keys, values in pool.layers():
            keys.copy_(torch.randn(keys.shape, generator=generator))
            if not pool.shape.is_shared:
                values.copy_(torch.randn(values.shape, generator=generator))
        return {**self.weights, **self.tables.tensors, **pool.named_tensors()}

    def steps(self) -> Iterator[tuple[Stage, Inputs]]:
        """Yields steps of all stages and of several sizes; run each before requesting the next."""
        inputs = StepInputs(BLOCK_SIZE, MAX_LEN // BLOCK_SIZE, self.tables)
        one = WorkerSequence("one", [5, 6, 7, 8, 9], [3], block_ids=[2, 3, 11])
        two = WorkerSequence("two", [*range(1, 10)], block_ids=[0, 1, 4])
        three = WorkerSequence("three", [*range(20, 45)], block_ids=[5, 6, 7, 8, 9, 10, 2])
        yield "prefill", inputs.make(NO_DECODES, [SequenceChunk(two, 0, 5)], [])
        yield "prefill", inputs.make(NO_DECODES, [SequenceChunk(two, 5, 4), SequenceChunk(three, 0, 25)], [3, 28])
        yield "decode", inputs.make(DecodeBatch([one]), [], [0])
        yield "decode", inputs.make(DecodeBatch([one, three]), [], [0, 1])
        yield "hybrid", inputs.make(DecodeBatch([one, three]), [SequenceChunk(two, 2, 7)], [0, 1, 8])
        one.output_token_ids.append(3)
        yield "decode", inputs.make(DecodeBatch([one]), [], [0])


@pytest.fixture(scope="session")
def runner() -> NativeRunner:
    """The native kernels of the package; tests that use it require a C++ compiler."""
    return make_runner(load_registry())


MakeTiny = Callable[[str, str], TinyModel]


@pytest.fixture(scope="session")
def make_tiny() -> MakeTiny:
    """make_tiny("llama", "f32") -> the layout's tiny model; equal arguments return the same one, with its graphs."""
    registry = load_registry()
    return cache(lambda name, dtype: _tiny(registry.models[name], dtype, registry))


def _tiny(layout: ModelLayout, dtype: str, registry: Registry) -> TinyModel:
    config = layout.read_config(HFConfig(layout.tiny, layout.name))
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for spec in layout.weights(config):
        noise = torch.randn(spec.shape, generator=generator)
        made = noise * spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 1 + 0.3 * noise
        weights[spec.name] = made.to(DTYPES[dtype]) if spec.tied_to is None else weights[spec.tied_to]
    compiler = ModelCompiler(layout, config, registry, dtype=dtype)
    return TinyModel(layout, config, dtype, compiler, weights, PositionTables(config, MAX_LEN))
