"""Embeddings: whole prompts in, vectors out. Prompts of any length share steps of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.engine.requests import validate_prompt
from sageLLM.runtime.errors import PromptError
from sageLLM.runtime.execution_graph.embedding import Pooling
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.native.weights import Weight
from sageLLM.runtime.executor.planner import Runnable
from sageLLM.runtime.loader.model import Model
from sageLLM.runtime.worker.faults import NOT_FINITE_REMEDY
from sageLLM.runtime.worker.kv_pool import KVPool, make_pool
from sageLLM.runtime.worker.sequences import NO_DECODES, SequenceChunk, WorkerSequence
from sageLLM.runtime.worker.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The embedding of one prompt: f32[H], or f32[n, H] with one row per token if pooling is "none"."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    embedding: Tensor = field(compare=False)


@dataclass(frozen=True, slots=True)
class EmbeddingInput:
    """One prompt, with the type id of each token for models that have token types (BERT's segments)."""

    token_ids: Sequence[int]
    type_ids: Sequence[int] | None = None


class Embedder:
    """Computes embeddings with one model. A step has up to `max_tokens` tokens, or one prompt that is longer.

    A layout with a KV cache gets a separate pool, as large as the largest step so far, so that embedding does not
    affect the engine's requests.
    """

    def __init__(
        self,
        model: Model,
        compiler: ModelCompiler,
        *,
        max_tokens: int,
        block_size: int,
        exclusive: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`exclusive` is held during every step, as steps share buffers with each other and with the engine's."""
        self._exclusive = exclusive
        self.model, self.compiler = model, compiler
        self.max_tokens, self.block_size = max_tokens, block_size
        max_blocks = -(-model.max_model_len // block_size)
        self._inputs = StepInputs(block_size, max_blocks, model.tables)
        self._pool: KVPool | None = None
        self._graphs: dict[tuple[Pooling, bool], ExecutionGraph] = {}
        self._plans: dict[tuple[Pooling, bool], Runnable] = {}

    def check(self, prompt: EmbeddingInput) -> None:
        """Raises PromptError for a prompt that the model cannot read; see also `embed` for the range of type ids."""
        validate_prompt(prompt.token_ids, self.model.config.V, self.model.max_model_len, generates=False)
        if prompt.type_ids is None:
            return
        if len(prompt.type_ids) != len(prompt.token_ids):
            counts = f"{len(prompt.type_ids)} for {len(prompt.token_ids)} tokens"
            raise PromptError(f"expected one type id per token, got {counts}", "type_ids")
        for one in prompt.type_ids:
            if isinstance(one, bool) or not isinstance(one, int) or one < 0:
                raise PromptError(f"type ids must be integers of at least 0, got {shown(one)}", "type_ids")

    @torch.inference_mode()
    def embed(self, prompts: Sequence[EmbeddingInput], pooling: Pooling, *, normalize: bool) -> list[Tensor]:
        """The embeddings of checked prompts, in float32 on the CPU, independent of the other prompts of a step.

        Raises PromptError for type ids beyond the model's, and for a prompt with an embedding that is not finite.
        """
        with self._exclusive():
            graph = self._graph(pooling, normalize)
        for prompt in prompts:
            self._check_types(prompt, graph)
        vectors: list[Tensor] = []
        for step in self._steps(prompts):
            with self._exclusive():
                # A copy, because the outputs are in the arena, which the next step overwrites.
                rows = self._run((pooling, normalize), step).to("cpu", torch.float32, copy=True)
            lengths = [len(prompt.token_ids) for prompt in step]
            vectors += torch.split(rows, lengths) if pooling == "none" else rows.unbind()
        for number, vector in enumerate(vectors):
            if not vector.isfinite().all():
                raise PromptError(
                    f"the embedding of prompt {number} is not finite (NaN or infinity); {NOT_FINITE_REMEDY}", "prompt"
                )
        return vectors

    def _graph(self, pooling: Pooling, normalize: bool) -> ExecutionGraph:
        key = (pooling, normalize)
        if key not in self._graphs:
            self._graphs[key] = self.compiler.embedding_graph(pooling, normalize=normalize)
        return self._graphs[key]

    def _check_types(self, prompt: EmbeddingInput, graph: ExecutionGraph) -> None:
        """Raises PromptError unless the type ids are rows of every table that the graph looks them up in."""
        if prompt.type_ids is None:
            return
        sizes = [ref.shape[0] for node in graph.users("type_ids") for ref in node.inputs if ref.name in graph.weights]
        if not sizes:
            name = self.model.layout.name
            raise PromptError(f"type_ids must be None for {name}, which does not use token types", "type_ids")
        num_types = min(int(str(size)) for size in sizes)
        if max(prompt.type_ids) >= num_types:
            message = f"type ids must be from 0 to {num_types - 1} for this model, got {max(prompt.type_ids)}"
            raise PromptError(message, "type_ids")

    def _steps(self, prompts: Sequence[EmbeddingInput]) -> Iterator[list[EmbeddingInput]]:
        """Yields the prompts in order, as many per step as fit in `max_tokens`."""
        step: list[EmbeddingInput] = []
        count = 0
        for prompt in prompts:
            if step and count + len(prompt.token_ids) > self.max_tokens:
                yield step
                step, count = [], 0
            step.append(prompt)
            count += len(prompt.token_ids)
        if step:
            yield step

    def _run(self, key: tuple[Pooling, bool], step: Sequence[EmbeddingInput]) -> Tensor:
        chunks, num_blocks = self._chunks(step)
        self._grow_pool(num_blocks)
        if key not in self._plans:
            self._plans[key] = self.compiler.plan(self._graphs[key], self._bound())
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        types = [one for prompt in step for one in prompt.type_ids or [0] * len(prompt.token_ids)]
        inputs = {
            **self._inputs.make(NO_DECODES, chunks, range(num_tokens)),
            "type_ids": torch.tensor(types, dtype=torch.int32),
        }
        return self._plans[key].run(inputs)[0]

    def _chunks(self, step: Sequence[EmbeddingInput]) -> tuple[list[SequenceChunk], int]:
        """Every prompt as one chunk with separate blocks, and the number of blocks in all."""
        chunks: list[SequenceChunk] = []
        first = 0
        for number, prompt in enumerate(step):
            count = len(prompt.token_ids)
            blocks = list(range(first, first + -(-count // self.block_size)))
            first += len(blocks)
            chunks.append(SequenceChunk(WorkerSequence(str(number), prompt.token_ids, block_ids=blocks), 0, count))
        return chunks, first

    def _grow_pool(self, num_blocks: int) -> None:
        """Grows the pool to `num_blocks`. Plans are bound to the pool's tensors, so a new pool drops them."""
        if "decode" in self.model.layout.phases and (self._pool is None or self._pool.num_blocks < num_blocks):
            self._pool = make_pool(self.model, num_blocks, self.block_size)
            self._plans.clear()

    def _bound(self) -> dict[str, Weight]:
        caches = {} if self._pool is None else self._pool.named_tensors()
        return {**self.model.bound_tensors(), **caches}
