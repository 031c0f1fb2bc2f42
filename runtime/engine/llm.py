"""`LLM`: the engine behind vLLM's offline interface, for a Hugging Face checkpoint folder."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.engine.embedding import Embedder, EmbeddingInput, EmbeddingOutput
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.kernel_choice import choose_planner
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.errors import PromptError, SageError, SamplingParamsError, TokenizerError
from sageLLM.runtime.execution_graph.embedding import Pooling, poolings_of
from sageLLM.runtime.execution_graph.rewriting import ALL
from sageLLM.runtime.executor.pipeline import Pipeline
from sageLLM.runtime.executor.planner import KernelChoice, KernelStats
from sageLLM.runtime.loader.model import Model, load_model
from sageLLM.runtime.loader.sentence_transformers import read_recipe
from sageLLM.runtime.registry.plugins import Registry, load_registry
from sageLLM.runtime.scheduler.base import KVBudget
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.text.chat_template import ChatTemplate
from sageLLM.runtime.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]

KV_CACHE_BYTES = 2**30
"""The default size of a KV pool; it is made smaller if the scheduler can never use as much."""


class LLM:
    """A model with its tokenizer, KV cache and scheduler.

        llm = LLM(model="path/to/checkpoint", scheduler=PDSchedulerConfig(mode="hybrid"))
        outputs = llm.generate(["def add(a, b):"], SamplingParams(max_tokens=32, temperature=0.0))

    `kernels` are those that the model runs on: "auto" takes what fits the device, on a CPU the generated C++ ("cpu"),
    which is compiled when it is first used; without a compiler, or with "reference", the slower torch references run.
    `kernel_stats()` tells what they are. `plugins` are folders made by `sagellm generate --specs ... --out FOLDER`.
    `disable_passes` names passes that are
    not run over the graphs.

    KV: `enable_prefix_caching` lets prompts reuse what equal beginnings have computed. `swap_space` and `disk_space`
    are GiB of host memory and of files in `disk_folder` (None: the system's folder for temporary files) to which
    preempted requests are moved when the pool of `num_kv_blocks` is full, so that they need not be computed again.

    `objective` is the service that the scheduler's mode "auto" aims at.

    Raises CheckpointError, TokenizerError or PluginError, naming file and remedy, for a folder
    that cannot be served, and SageError for another argument that cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        kernels: KernelChoice = "auto",
        scheduler: PDSchedulerConfig | None = None,
        max_model_len: int | None = None,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
        enable_prefix_caching: bool = True,
        swap_space: float = 0.0,
        disk_space: float = 0.0,
        disk_folder: str | Path | None = None,
        objective: ServiceObjective | None = None,
        plugins: Sequence[str | Path] = (),
        disable_passes: Sequence[str] = (),
        skip_tokenizer: bool = False,
    ) -> None:
        folder = Path(model)
        where = _device(device)
        _check_count("block_size", block_size)
        if num_kv_blocks is not None:
            _check_count("num_kv_blocks", num_kv_blocks)
        registry = load_registry(plugins)
        _check_passes(disable_passes, registry)
        self.tokenizer = None if skip_tokenizer else Tokenizer.from_folder(folder)
        self.model = load_model(folder, registry, dtype=dtype, device=where, max_model_len=max_model_len)
        self.pipeline = Pipeline(
            self.model.layout,
            self.model.config,
            registry,
            dtype=self.model.short_dtype,
            disable=disable_passes,
            planner=choose_planner(kernels, registry, where, self.model.short_dtype),
        )
        self.pipeline.planner.hold(self.model.weights, self.model.ties, self._graphs())
        config = scheduler or PDSchedulerConfig()
        budget = KVBudget(
            num_kv_blocks or default_num_blocks(self.model, config, block_size),
            block_size,
            num_host_blocks=num_tier_blocks(self.model, "swap_space", swap_space, block_size),
            num_disk_blocks=num_tier_blocks(self.model, "disk_space", disk_space, block_size),
        )
        config = _with_kv_options(config, budget, enable_prefix_caching)
        where_on_disk = None if disk_folder is None else Path(disk_folder)
        self._engine: Engine | None = None
        if self.model.generates:
            self._engine = Engine(self.model, self.tokenizer, self.pipeline, config, budget, where_on_disk, objective)
        self._embedder = Embedder(
            self.model, self.pipeline, max_tokens=config.max_prefill_tokens, block_size=block_size
        )
        self._recipe = read_recipe(folder)
        self._ids = itertools.count()
        self._chat_template: ChatTemplate | None = None

    @property
    def engine(self) -> Engine:
        """The engine that generates; SageError for a model that only embeds."""
        if self._engine is None:
            missing = f" without {', '.join(self.model.absent)}" if self.model.absent else ""
            name = self.model.layout.name + missing
            raise SageError(
                f"{name} gives embeddings, not text; call embed() instead of generate(), stream() or chat()"
            )
        return self._engine

    def _graphs(self) -> list[ExecutionGraph]:
        """The graphs that read all of the model's weights."""
        layout = self.model.layout
        if self.model.generates:
            return [self.pipeline.kernel_graph(stage) for stage in layout.phases]
        pooling = poolings_of(layout)
        return [self.pipeline.embedding_graph(pooling[0], normalize=False)] if pooling else []

    def kernel_stats(self) -> list[KernelStats]:
        """What each graph runs on that has run so far: native calls, and calls in Python with the reasons."""
        return list(self.pipeline.planner.stats)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        type_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[EmbeddingOutput]:
        """The embeddings of all prompts (text, or token ids), in order.

        `pooling` is one of POOLINGS, `normalize` divides by the length. What is not given is taken from the folder's
        modules.json, as sentence-transformers writes it; else the pooling is the layout's own, or "last" for a model
        that generates, or "mean", and nothing is normalised. `type_ids` are the kinds of the tokens, zeros unless
        given. Raises SageError for a pooling that the model does not have, RequestError for a prompt.
        """
        asked = _as_list(prompts)
        kinds: Sequence[Sequence[int] | None] = [None] * len(asked) if type_ids is None else type_ids
        if len(kinds) != len(asked):
            raise PromptError(f"{len(kinds)} lists of type ids for {len(asked)} prompts; give one for each", "type_ids")
        chosen = self._pooling(pooling)
        inputs = [EmbeddingInput(self._token_ids(one), kind) for one, kind in zip(asked, kinds, strict=True)]
        for one in inputs:
            self._embedder.check(one)
        is_normal = self._recipe.normalize if normalize is None else normalize
        vectors = self._embedder.embed(inputs, chosen, normalize=is_normal)
        return [
            EmbeddingOutput(prompt if isinstance(prompt, str) else None, tuple(one.token_ids), vector)
            for prompt, one, vector in zip(asked, inputs, vectors, strict=True)
        ]

    def _pooling(self, asked: Pooling | None) -> Pooling:
        """The pooling that is asked for, or the default; SageError if the model does not have it."""
        layout = self.model.layout
        there = poolings_of(layout)
        if not there:
            raise SageError(
                f"the layout '{layout.name}' names no value to embed with; "
                f"add `hidden: NAME` to {layout.spec} (docs/add-a-model.md)"
            )
        if asked is None and self._recipe.refusal is not None:
            raise SageError(f"{self._recipe.refusal}; choose by pooling=: {', '.join(there)}")
        default: Pooling = "model" if layout.pooled else "last" if layout.generates else "mean"
        chosen = asked or self._recipe.pooling or default
        if chosen not in there:
            raise SageError(f"pooling is {shown(chosen)}; {layout.name} has {', '.join(there)}")
        return chosen

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes all prompts (text, or token ids) and returns their outputs in order.

        Nothing runs if one of them is refused: RequestError says which, and why.
        """
        order = self._add_all(prompts, params)
        done: dict[str, RequestOutput] = {}
        while self.engine.has_work:
            done |= {output.request_id: output for output in self.engine.step(only_finished=True)}
        return [done[request_id] for request_id in order]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields a request's state (text so far) whenever it has new tokens."""
        self._add_all(prompts, params)
        while self.engine.has_work:
            yield from self.engine.step()

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None) -> RequestOutput:
        """Answers a conversation of {"role", "content"} messages, put into text by the checkpoint's chat template."""
        tokenizer = self._needed_tokenizer("chat")
        if self._chat_template is None:
            self._chat_template = ChatTemplate.from_tokenizer(tokenizer)
        text = self._chat_template.render(messages, add_generation_prompt=True)
        return self.generate([tokenizer.encode(text, add_special_tokens=False)], params)[0]

    def _add_all(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[str]:
        """Checks every request, then queues them all; returns their ids."""
        asked = _as_list(prompts)
        each = _params_for(asked, params)
        token_ids = [self._token_ids(prompt) for prompt in asked]
        for ids, one in zip(token_ids, each, strict=True):
            self.engine.check(ids, one)
        order = []
        for prompt, ids, one in zip(asked, token_ids, each, strict=True):
            request_id = str(next(self._ids))
            self.engine.add(request_id, prompt if isinstance(prompt, str) else None, ids, one)
            order.append(request_id)
        return order

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._needed_tokenizer("a text prompt").encode(prompt)
        if not hasattr(prompt, "__iter__"):
            raise PromptError(f"a prompt is {shown(prompt)}; give a text or a list of token ids", "prompt")
        return list(prompt)

    def _needed_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{what} needs the tokenizer; load the model without skip_tokenizer, or give token ids"
            )
        return self.tokenizer


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise SageError(f"device is {shown(name)}; use cpu, or cuda where there is a GPU") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SageError(f"device is {shown(name)}, and this PyTorch sees no GPU; use cpu")
    return device


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SageError(f"{name} is {shown(value)}; it must be an integer of at least 1")


def _check_passes(names: Sequence[str], registry: Registry) -> None:
    known = [*registry.passes, ALL]
    if unknown := [name for name in names if name not in known]:
        raise SageError(f"disable_passes names {', '.join(map(shown, unknown))}; known are {', '.join(known)}")


def default_num_blocks(model: Model, config: PDSchedulerConfig, block_size: int) -> int:
    """Blocks that fit KV_CACHE_BYTES, but no more than all decodes at full length would use."""
    block_bytes = bytes_per_block(model, block_size)
    longest = -(-model.max_model_len // block_size)
    affordable: int = KV_CACHE_BYTES // block_bytes
    return max(longest, min(affordable, longest * config.max_decode_batch_size))


def bytes_per_block(model: Model, block_size: int) -> int:
    """The KV of `block_size` tokens, over all layers."""
    c = model.config
    num_bytes: int = c.L * block_size * model.layout.cache(c).num_elements * model.dtype.itemsize
    return num_bytes


def num_tier_blocks(model: Model, name: str, gib: float, block_size: int) -> int:
    """Blocks that fit in a tier of so many GiB; 0 GiB is no tier."""
    if isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 <= gib < math.inf:
        raise SageError(f"{name} is {shown(gib)}; it must be a number of GiB, at least 0")
    block_bytes = bytes_per_block(model, block_size)
    num_blocks = int(gib * 2**30) // block_bytes
    if gib and not num_blocks:
        raise SageError(f"{name} is {gib} GiB, and one KV block takes {block_bytes} bytes; give more, or 0 for none")
    return num_blocks


def _with_kv_options(config: PDSchedulerConfig, budget: KVBudget, enable_prefix_caching: bool) -> PDSchedulerConfig:
    """The scheduler's config as the LLM's own options have it; with a tier, preempted requests are swapped."""
    has_tier = bool(budget.num_host_blocks or budget.num_disk_blocks)
    if config.preemption_mode == "swap" and not has_tier:
        raise SageError("preemption_mode is 'swap' and there is nowhere to swap to; give swap_space or disk_space")
    return replace(
        config,
        enable_prefix_caching=config.enable_prefix_caching and enable_prefix_caching,
        preemption_mode="swap" if has_tier else "recompute",
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not prompts:
        raise PromptError("no prompt was given; give a text, a list of token ids, or a list of these", "prompt")
    if all(isinstance(item, int) for item in prompts):
        return [cast(Prompt, list(prompts))]
    return cast(list[Prompt], list(prompts))


def _params_for(
    prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise SamplingParamsError(
            f"{len(params)} sampling parameters were given for {len(prompts)} prompts; "
            "give one for all, or one for each"
        )
    return list(params)
