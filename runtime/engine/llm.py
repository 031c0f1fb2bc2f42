"""`LLM`: vLLM's offline interface to the engine, for a Hugging Face checkpoint folder."""

import itertools
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.core.cost import Hardware
from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.engine.arguments import Backend
from sageLLM.runtime.engine.calls import SharedEngine
from sageLLM.runtime.engine.chat import ChatOptions, ChatPrompts
from sageLLM.runtime.engine.embedding import Embedder, EmbeddingInput, EmbeddingOutput
from sageLLM.runtime.engine.embedding_requests import choose_pooling
from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.options import LLMOptions
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.prompt_ids import PromptIds, no_tokenizer
from sageLLM.runtime.engine.prompts import (
    ParsedPrompt,
    Prompt,
    Prompts,
    params_per_prompt,
    parse_prompts,
    type_ids_per_prompt,
)
from sageLLM.runtime.engine.sampling_defaults import sampling_defaults
from sageLLM.runtime.engine.sequences import RequestGroup, RequestTraits
from sageLLM.runtime.engine.start_llm import start_llm
from sageLLM.runtime.errors import PromptError, RequestError, SageError
from sageLLM.runtime.execution_graph.embedding import Pooling
from sageLLM.runtime.executor.planner import KernelChoice, KernelStats
from sageLLM.runtime.executor.weight_stats import WeightStats, weight_stats
from sageLLM.runtime.kv.copies import Tier
from sageLLM.runtime.loader.activations import ActivationDtype
from sageLLM.runtime.loader.kv_form import KvCacheDtype
from sageLLM.runtime.loader.sentence_transformers import model_folder, read_recipe
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.forecast import ServiceObjective
from sageLLM.runtime.scheduler.group_transfers import LoadFailurePolicy
from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.text.chat_messages import Conversation
from sageLLM.runtime.worker.build import WeightsTier
from sageLLM.runtime.worker.io_report import IoReport
from sageLLM.runtime.worker.kv_group import TransportName


class LLM:
    """A model with its tokenizer, KV cache and scheduler.

        llm = LLM(model="path/to/checkpoint", scheduler=PDSchedulerConfig(mode="hybrid"))
        outputs = llm.generate(["def add(a, b):"], SamplingParams(max_tokens=32, temperature=0.0))

    `kernels`: "auto" selects the best kernels of the device: on a CPU the generated C++ ("cpu"), compiled on first use,
    and on a GPU the generated Triton ("triton"). Without a compiler, or with "reference", the slower torch references
    run. `kernel_stats()` reports the kernels in use. `enforce_eager` captures no CUDA graphs. `plugins` are folders
    made by `sagellm generate --specs ... --out FOLDER`. `disable_passes` names graph passes to skip.

    KV cache: `num_kv_blocks` blocks in each pool (strict mode has two); by default on a CPU 1 GiB in total, more only
    if the longest sequence needs it, and on a GPU what `gpu_memory_utilization`, a fraction of all its memory, leaves
    after the weights and the largest step. `kv_cache_size` states the size and its reason. `kv_cache_dtype` "int8" or
    "fp8" stores keys and values in 8 bits, with a scale per token and head; "auto" in the element type
    (docs/kv-cache.md). `enable_prefix_caching`
    reuses the KV of equal prompt prefixes. `swap_space` and `disk_space` are GiB of host memory and of files in
    `disk_folder` (None: the system's folder for temporary files); requests that are preempted when the pool is full are
    swapped there and need not be computed again.

    `activation_dtype` "int8" rounds the activations of products with weights of integer codes to 8 bits, with a scale
    for each 32 inputs of a row (dynamic quantisation, W8A8 and W4A8): prompts are faster, and answers differ from those
    of the dequantised weights, within a bound (docs/formats.md). "auto" does not round them.

    `kv_tier`, "host" or "disk", adds `kv_tier_space` GiB of host memory or of a file for running requests: blocks for
    which the pool has no room lie there, and each step loads those that it reads layer by layer (docs/tiers.md).

    `weights_tier="mapped"`: the packed weights are in a file that is mapped, so that later starts pack nothing, and
    processes share its pages. "disk": the weights of the layers stay in a file and are read in each step, one layer
    ahead, so that a model larger than the memory runs (docs/tiers.md). `weights_budget` is the memory for weights in
    GiB then, by default as little as possible. A file is made once, in `weights_folder` or the user's cache.

    Threads can share an `LLM`, and streams can be interleaved or dropped half-way: each call owns its requests
    (docs/engine.md). `AsyncLLM` has the interface for asyncio. Only `engine` is not safe to use next to other calls.

    `generation_config`: calls without `params` take the temperature, top_k, top_p, min_p, repetition_penalty and
    max_new_tokens of the checkpoint's generation_config.json, as in vLLM; "vllm" takes the defaults of SamplingParams,
    and a folder the file there.

    `async_scheduling` plans each step while the one before it runs; the answers are the same without.

    `distributed_executor_backend`: "uni" runs the model in this process, the default, and "mp" in worker processes, one
    for each of `tensor_parallel_size` ranks in each of `pipeline_parallel_size` stages. Lost workers are started again,
    and their requests are replayed. `pp_layer_partition`, such as "20,10", sets the layers of each stage, as
    VLLM_PP_LAYER_PARTITION does in vLLM; by default the stages read about as many bytes of weights in a step, the head
    included. With `enable_expert_parallel` each rank has some of the experts of a layer, instead
    of a part of each.

    `nnodes`, `node_rank`, `master_addr` and `master_port` are for ranks on several hosts (docs/parallel.md); the
    variables of torchrun are used if it has started a process per rank. On the other hosts the constructor runs their
    ranks and does not return: the process ends with the engine.

    `num_ubatches` divides the rows of each step into so many micro-batches, which go through the layers in turns: while
    one communicates, another computes. The answers are the same.

    `overlap_transfers` runs the collectives and transfers of worker processes on streams of their own, next to
    computation that does not need them; None decides by the free cores.

    `af` "A:F" runs attention on A worker processes, among which the requests are divided and each of which has a KV
    cache, and the feed-forwards on F others, which keep no state (attention-FFN disaggregation). The micro-batches
    alternate between the two roles. "A:FxN" runs F groups of N workers that divide the weights of a feed-forward, or
    with `enable_expert_parallel` its experts.

    `prefill_workers` and `decode_workers`, in mode "strict", run so many workers of each role in processes of their
    own, each at its own pace; the KV of a prompt is copied from one to the other by `kv_transport`, "shared_memory",
    "tcp" or "nixl" (docs/disaggregation.md). `prefill_tensor_parallel_size`, `decode_tensor_parallel_size` and
    `decode_block_size` are those of the roles, by default the general ones. With `kv_load_failure_policy="fail"` a
    request ends when its KV cannot be transferred, instead of being computed again.

    `scheduler` is by default in mode "hybrid"; `objective` is the service level that its mode "auto" optimises for.

    Raises CheckpointError, TokenizerError or PluginError for a folder that cannot be served, with the file and the
    remedy, and SageError for any other invalid argument.
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
        kv_cache_dtype: KvCacheDtype = "auto",
        activation_dtype: ActivationDtype = "auto",
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        swap_space: float = 0.0,
        disk_space: float = 0.0,
        disk_folder: str | Path | None = None,
        kv_tier: Tier = "device",
        kv_tier_space: float = 4.0,
        weights_tier: WeightsTier = "device",
        weights_budget: float | None = None,
        weights_folder: str | Path | None = None,
        objective: ServiceObjective | None = None,
        plugins: Sequence[str | Path] = (),
        disable_passes: Sequence[str] = (),
        skip_tokenizer: bool = False,
        generation_config: str | Path = "auto",
        async_scheduling: bool = True,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        pp_layer_partition: str | None = None,
        enable_expert_parallel: bool = False,
        distributed_executor_backend: Backend | None = None,
        nnodes: int | None = None,
        node_rank: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        num_ubatches: int = 1,
        overlap_transfers: bool | None = None,
        af: str | None = None,
        prefill_workers: int | None = None,
        decode_workers: int | None = None,
        prefill_tensor_parallel_size: int | None = None,
        decode_tensor_parallel_size: int | None = None,
        decode_block_size: int | None = None,
        kv_transport: TransportName = "shared_memory",
        kv_load_failure_policy: LoadFailurePolicy = "recompute",
        kv_events_config: str | dict[str, Any] | None = None,
    ) -> None:
        options = LLMOptions.of(locals())
        folder = model_folder(Path(model))
        self._sampling_defaults = sampling_defaults(folder, options.generation_config)
        started = start_llm(folder, options)
        self.model, self.tokenizer, self.compiler = started.model, started.tokenizer, started.compiler
        self.kv_cache_size = started.kv_cache_size
        self._backend, self._engine, self._ffn_workers = started.backend, started.engine, started.ffn_workers
        self.shared = SharedEngine(self._engine)
        self._embedder = Embedder(
            self.model,
            self.compiler,
            max_tokens=started.config.max_prefill_tokens,
            block_size=options.block_size,
            exclusive=self.shared.exclusive,
        )
        self._recipe = read_recipe(Path(model))
        self._prompt_ids = PromptIds(self.tokenizer, self._recipe, self.model.max_model_len)
        self._ids = itertools.count()
        self._chat = None if self.tokenizer is None else ChatPrompts(self.tokenizer)

    @property
    def engine(self) -> Engine:
        """The engine that generates text. SageError for a model that only computes embeddings."""
        if self._engine is None:
            missing = f" without {', '.join(self.model.absent)}" if self.model.absent else ""
            name = self.model.layout.name + missing
            raise SageError(
                f"{name} computes embeddings, not text; call embed() instead of generate(), stream() or chat()"
            )
        return self._engine

    def close(self) -> None:
        """Ends worker processes and threads; also done when the `LLM` is garbage, and at the end of the program."""
        if self._engine is not None:
            self._engine.close()
        if self._ffn_workers is not None:
            self._ffn_workers.close()

    @property
    def runs_in_processes(self) -> bool:
        """Whether worker processes run the model."""
        return self._backend == "mp"

    def kernel_stats(self) -> list[KernelStats]:
        """For each graph that has run so far: its native calls, and its calls in Python with the reasons."""
        return list(self.compiler.planner.stats)

    def weight_stats(self) -> list[WeightStats]:
        """The matrices of the model by form, the kernels that read them, and why others were dequantised.

        Empty if worker processes run the model.
        """
        model = self.model
        return weight_stats(
            model.weights, model.ties, self.compiler.planner, model.dequantized, model.declared_activations
        )

    def io_stats(self, hardware: Hardware | None = None) -> list[IoReport]:
        """For each graph with transfers between tiers: the part of their time in which kernels ran as well.

        The planned part is estimated with the rates of `hardware`, by default the generated "cpu". Worker processes
        report each rank. Empty without `kv_tier` and `weights_tier`, and without a C++ compiler.
        """
        if self._engine is None:
            return []
        return self._engine.executor.io_reports(hardware or HARDWARE["cpu"])

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        type_ids: Sequence[Sequence[int]] | None = None,
        prompt_name: str | None = None,
    ) -> list[EmbeddingOutput]:
        """Embeds all prompts (see `prompts.py` for their forms) and returns their embeddings in order.

        `pooling` is one of POOLINGS; `normalize` scales to unit length. By default both come from the folder's
        modules.json (sentence-transformers); without that file the pooling is the layout's, else "last" for a
        generative model, else "mean", and vectors are not normalised. `type_ids` are the token type ids of each prompt,
        zeros by default. In a folder of sentence-transformers, texts follow the folder's prompt of the name
        `prompt_name` (None: its default, "": none), and are cut to its `max_seq_length`, or to the model's length.
        Raises SageError for a pooling that the model does not support, and RequestError for an invalid prompt, and for
        one with an embedding that is not finite.
        """
        if self._backend == "mp" and self.model.generates:
            raise SageError(
                "embed must not be called with the weights in worker processes; "
                "load the model with one rank and distributed_executor_backend='uni'"
            )
        items = parse_prompts(prompts)
        types = type_ids_per_prompt(len(items), type_ids)
        chosen = choose_pooling(pooling, self.model.layout, self._recipe)
        inputs = [
            EmbeddingInput(self._prompt_ids.to_embed(item, prompt_name), type_)
            for item, type_ in zip(items, types, strict=True)
        ]
        for one in inputs:
            self._embedder.check(one)
        vectors = self._embedder.embed(
            inputs, chosen, normalize=self._recipe.normalize if normalize is None else normalize
        )
        return [
            EmbeddingOutput(item.text, tuple(one.token_ids), vector)
            for item, one, vector in zip(items, inputs, vectors, strict=True)
        ]

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes all prompts and returns their outputs in order.

        A prompt is a text, a list, array or tensor of token ids, or a dict with "prompt" or "prompt_token_ids".
        `params` apply to all prompts, or there is one per prompt. Nothing runs if one request is invalid; RequestError
        then names the field and the rule. A request that fails later ends with `finish_reason` "abort" and the cause as
        `stop_reason`; the others continue.
        """
        groups = self._prepare_all(prompts, params)
        for group in groups:
            group.is_streamed = False
        done = {output.request_id: output for output in self.shared.outputs(groups)}
        return [done[group.request_id] for group in groups]

    def stream(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Like `generate`, but yields a request's output so far whenever it has new tokens.

        Requests are checked by the call and queued by the first `next`. Closing the iterator, dropping it, or an
        exception in its consumer aborts those that are not finished.
        """
        return self.shared.outputs(self._prepare_all(prompts, params))

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of calls without `params`."""
        return self._sampling_defaults

    def abort(self, request_id: str) -> None:
        """Ends a request; its call gets the output so far, with `finish_reason` "abort". An unknown id is ignored."""
        self.shared.abort(request_id)

    @overload
    def chat(
        self, messages: Conversation, params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answers a conversation of {"role", "content"} messages, rendered by a chat template.

        For a list of conversations it returns a list. A content is a text or a list of text parts. `chat_template` is
        Jinja source to use instead of the checkpoint's. `continue_final_message` continues the last message instead of
        beginning an answer, and requires `add_generation_prompt=False`. `tools` are the functions that the model can
        call, in OpenAI's form; `chat_template_kwargs` are further variables of the template, such as enable_thinking.
        Raises ChatTemplateError for a template that rejects the messages, and RequestError for an invalid argument.
        """
        if self._chat is None:
            raise no_tokenizer("chat")
        prompts, is_batch = self._chat.render(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        outputs = self.generate(prompts, params)
        return outputs if is_batch else outputs[0]

    def prepare_one(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        request_id: str | None,
        traits: RequestTraits | None = None,
    ) -> RequestGroup:
        """Checks one request without queueing it; without an id it gets a new one. Raises RequestError."""
        items = parse_prompts(prompt)
        if len(items) != 1:
            raise PromptError(f"expected one prompt, got {len(items)}; make one call for each", "prompt")
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise RequestError(f"request_id must be a text that is not empty, got {shown(request_id)}", "request_id")
        one = params_per_prompt(1, params, self._sampling_defaults)[0]
        return self._prepare(items[0], one, request_id, traits)

    def _prepare_all(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestGroup]:
        """Prepares every request before the first is queued, so that an invalid one queues nothing."""
        items = parse_prompts(prompts)
        per_prompt = params_per_prompt(len(items), params, self._sampling_defaults)
        return [self._prepare(item, one) for item, one in zip(items, per_prompt, strict=True)]

    def _prepare(
        self,
        prompt: ParsedPrompt,
        params: SamplingParams,
        request_id: str | None = None,
        traits: RequestTraits | None = None,
    ) -> RequestGroup:
        if request_id is None:
            request_id = next(new for new in map(str, self._ids) if not self.shared.is_live(new))
        return self.engine.prepare(request_id, prompt.text, self._prompt_ids.to_generate(prompt), params, traits)
