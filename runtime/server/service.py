"""State shared by the handlers: the engine, the tokenizer, the queue, the metrics, the settings."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from sageLLM import __version__
from sageLLM.runtime.core.dialects.grammar import Constraint, reasoning_grammar
from sageLLM.runtime.core.dialects.model import Dialect
from sageLLM.runtime.core.dialects.parser import DialectParser
from sageLLM.runtime.engine.chat import ChatPrompts
from sageLLM.runtime.engine.requests import check_kv_room, validate_params, validate_prompt
from sageLLM.runtime.engine.sampling_defaults import sampling_defaults
from sageLLM.runtime.errors import ChatTemplateError, RequestError, SageError
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.loader.sentence_transformers import EmbeddingRecipe, model_folder, read_recipe
from sageLLM.runtime.registry.plugins import load_dialects
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.server.admission import Admission, Ticket
from sageLLM.runtime.server.bodies import Sampled
from sageLLM.runtime.server.dialects import ChosenDialects, choose_dialects
from sageLLM.runtime.server.engine_client import EngineClient
from sageLLM.runtime.server.errors import ApiError
from sageLLM.runtime.server.exchange import ClientGoneError, Exchange
from sageLLM.runtime.server.generation import Generation, Traits, usage_of
from sageLLM.runtime.server.messages import Load, Ready, SetTokenizer
from sageLLM.runtime.server.metrics import Metrics
from sageLLM.runtime.server.output_parser import CallParser, FormParser, OutputParser, PlainParser
from sageLLM.runtime.server.prompts import EnginePrompt
from sageLLM.runtime.server.settings import ServerSettings
from sageLLM.runtime.server.structured import FORMAT
from sageLLM.runtime.server.tools import ToolUse, forced_calls
from sageLLM.runtime.server.tracing import Tracing, make_tracing
from sageLLM.runtime.text.tokenizer import Tokenizer, start_probe

LOG = logging.getLogger("sagellm")
QUEUED_CACHES = 4
"""The default limit of queued prompt tokens, in KV caches."""


class Service:
    """A server's state. `start` builds the engine while a child process tries the tokenizer."""

    def __init__(
        self,
        settings: ServerSettings,
        client: EngineClient,
        generation_config: str = "auto",
        dialects: Mapping[str, Dialect] | None = None,
    ) -> None:
        """`dialects` are those of the package by default. Raises SageError for an invalid option."""
        self.settings, self.client, self._generation_config = settings, client, generation_config
        self.chat_template = _read_template(settings.chat_template)
        self.template_kwargs = _template_kwargs(settings.default_chat_template_kwargs)
        self.folder = model_folder(Path(settings.model))
        self.tokenizer: Tokenizer | None = None
        self.chat: ChatPrompts | None = None
        self._known_dialects = load_dialects() if dialects is None else dialects
        self.dialects = self._choose_dialects()
        self._special_marks: dict[bool, dict[str, int]] = {False: {}, True: {}}
        self.defaults = SamplingParams()
        self.recipe = EmbeddingRecipe()
        self.grammars: GrammarCompiler | None = None
        self.eos_ids: frozenset[int] = frozenset()
        self.admission = Admission(settings.max_num_queued_reqs, 0)
        self.metrics = Metrics(settings.metrics_namespace, settings.model_names[0])
        self.tracing = make_tracing(settings.otlp_traces_endpoint, settings.model_names[0])
        self.fingerprint = _fingerprint(settings)
        self.created = int(time.time())
        self.num_active = 0
        self.is_started = False
        self.tokenizer_reader = tokenizer_reader

    async def start(self) -> Ready:
        """Raises SageError for an invalid checkpoint or option, EngineError if the engine does not start."""
        self.defaults = sampling_defaults(self.folder, self._generation_config)
        self.recipe = read_recipe(Path(self.settings.model))
        with self.tokenizer_reader(self.folder) as read:
            ready = await self.client.start()
            self.tokenizer = read(ready.max_model_len)
        self.chat = None if self.tokenizer is None else ChatPrompts(self.tokenizer)
        self.dialects = self._choose_dialects()
        self._special_marks = {is_on: self._find_special_marks(is_on) for is_on in (False, True)}
        tokenizer_ids = self.tokenizer.eos_token_ids if self.tokenizer else frozenset[int]()
        self.eos_ids = frozenset(i for i in {*tokenizer_ids, *ready.eos_ids} if i < ready.vocab_size)
        self.client.set_tokenizer(self._facts(ready))
        self.grammars = GrammarCompiler(self.folder, ready.vocab_size, self.tokenizer)
        limit = self.settings.max_num_queued_tokens
        capacity = max(ready.num_kv_blocks * ready.block_size, ready.max_model_len)
        self.admission.max_tokens = QUEUED_CACHES * capacity if limit is None else limit
        self.metrics.describe_engine(ready)
        self.client.on_load = self._on_load
        self.client.on_lost = self.metrics.lose_engine
        # While the engine prepares it too. Until it has, a step would wait for it, and so would every request here.
        await asyncio.to_thread(self.grammars.prepare, self.eos_ids)
        await self._prepare_chat()
        self.is_started = True
        return ready

    def _facts(self, ready: Ready) -> SetTokenizer:
        if self.tokenizer is None or not ready.generates:
            return SetTokenizer(sorted(self.eos_ids))
        return SetTokenizer(sorted(self.eos_ids), self.tokenizer.to_json(), self.tokenizer.vocab_size)

    def close(self) -> None:
        """Ends the processes of chat templates, and sends the last spans."""
        if self.chat is not None:
            self.chat.close()
        if self.tracing is not None:
            self.tracing.close()

    @property
    def ready(self) -> Ready:
        assert self.client.ready is not None
        return self.client.ready

    def why_not_ready(self) -> str | None:
        """The reason why no request is accepted, or None."""
        if self.admission.is_draining:
            return "the server is shutting down"
        if not self.is_started:
            return "the server is starting"
        if self.client.state != "ready":
            return f"the engine is not ready ({self.client.state})"
        return None

    def require_started(self) -> None:
        if not self.is_started:
            raise ApiError(503, "the server is starting", headers={"Retry-After": "1"}, reason="not_ready")

    def require_engine(self) -> None:
        self.require_started()
        if self.client.state != "ready":
            text = f"the engine is not ready ({self.client.state})"
            raise ApiError(503, text, headers={"Retry-After": "1"}, reason="not_ready")

    def require_generation(self) -> None:
        if not self.ready.generates:
            raise ApiError(404, f"{self.ready.layout} computes embeddings, not text; use /v1/embeddings")

    def generate(
        self, exchange: Exchange, name: str, body: Sampled, prompts: Sequence[EnginePrompt], ticket: Ticket
    ) -> Generation:
        """Submits the prompts. A client that goes away aborts them. Raises RequestError for one that is invalid."""
        ready = self.ready
        for prompt in prompts:
            validate_prompt(prompt.token_ids, ready.vocab_size, ready.max_model_len)
            validate_params(prompt.params, ready.vocab_size)
            check_kv_room(prompt.params, len(prompt.token_ids), ready.max_kv_tokens, ready.max_model_len)
        num_requests = sum(prompt.params.n for prompt in prompts)
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.admission.correct(ticket, num_requests, num_tokens)
        generation = Generation(
            name,
            prompts,
            Traits(body.priority, body.deadline, body.tenant, body.cache_salt or ""),
            client=self.client,
            tokenizer=self.tokenizer,
            ready=ready,
            eos_ids=self.eos_ids,
            admission=self.admission,
            ticket=ticket,
            metrics=self.metrics,
            arrival=exchange.arrival,
        )
        if self.tracing is not None:
            generation.on_close = partial(self._trace, self.tracing, exchange)
        exchange.watch_client(lambda: generation.inbox.fail(ClientGoneError()))
        return generation

    async def check_grammar(self, params: SamplingParams, body: Sampled) -> None:
        """Compiles a grammar before the request is queued. Raises RequestError for one that cannot be enforced."""
        if params.structured_outputs is None or self.grammars is None:
            return
        try:
            # In a thread: the first one prepares the vocabulary, and large schemas take milliseconds.
            await asyncio.to_thread(self.grammars.check, params.structured_outputs, self.eos_ids)
        except RequestError as error:
            if body.response_format is None or error.param != "structured_outputs":
                raise
            raise RequestError(re.sub(r"^structured_outputs\.\w+", FORMAT, str(error)), FORMAT) from None

    def make_parser(self, tools: ToolUse, prompt: EnginePrompt) -> OutputParser:
        """The parser of a chat answer, by the dialects of the checkpoint; calls are text unless there are tools.

        Structured output after reasoning is content as it is.
        """
        has_form = prompt.params.structured_outputs is not None and not tools.is_forced
        calls = self.dialects.calls if tools.may_call and not has_form else None
        reasoning, skip = self.dialects.reasoning, self.dialects.skip
        if calls is None and reasoning is None and (has_form or not skip):
            return PlainParser()
        is_open = self.opened_reasoning(prompt.text)
        parser = DialectParser(calls, reasoning, skip, tools=tools.schemas, in_reasoning=is_open)
        found = CallParser(parser, in_reasoning=is_open, max_calls=None if tools.is_parallel else 1)
        return FormParser(found) if has_form else found

    def opened_reasoning(self, prompt: str | None) -> bool:
        """Whether the prompt ends with the mark before reasoning."""
        reasoning = self.dialects.reasoning
        return reasoning is not None and (prompt or "").rstrip().endswith(reasoning.open.strip())

    def kept_ids(self, tools: ToolUse) -> frozenset[int]:
        """Special tokens that are marks of the dialects, which the parser of an answer has to see."""
        return frozenset(self._special_marks[tools.may_call].values())

    def constrain(self, params: SamplingParams, tools: ToolUse, prompt: str) -> SamplingParams:
        """The parameters with the grammar of forced calls, or of reasoning before a form. Raises ApiError 400."""
        calls, reasoning, form = self.dialects.calls, self.dialects.reasoning, params.structured_outputs
        if tools.is_forced and form is not None:
            raise ApiError(400, "a forced call cannot be combined with structured output", "tool_choice")
        constraint = Constraint(
            {},
            special_ids=self._special_marks[tools.may_call],
            end_ids=self.eos_ids,
            reasoning=reasoning,
            in_reasoning=self.opened_reasoning(prompt),
        )
        if tools.is_forced and calls is not None:
            return replace(params, structured_outputs=forced_calls(calls, tools, constraint))
        if form is None or reasoning is None:
            return params
        before = reasoning_grammar(constraint, self.dialects.skip, "@form")
        return replace(params, structured_outputs=replace(form, before=before))

    def _find_special_marks(self, with_calls: bool) -> dict[str, int]:
        if self.tokenizer is None:
            return {}
        marks = self.dialects.marks(with_calls=with_calls)
        texts = ((self.tokenizer.decode([one], skip_special_tokens=False), one) for one in self.tokenizer.special_ids)
        return {text: one for text, one in texts if text and text in marks}

    def _choose_dialects(self) -> ChosenDialects:
        """By the template of the operator, else by those of the checkpoint, once they are read."""
        templates = self.tokenizer.chat_templates.values() if self.tokenizer else ()
        text = self.chat_template if self.chat_template is not None else "\n".join(templates)
        return choose_dialects(
            self._known_dialects, text, self.settings.tool_call_parser, self.settings.reasoning_parser
        )

    @staticmethod
    def _trace(tracing: Tracing, exchange: Exchange, generation: Generation) -> None:
        try:
            parent = exchange.header(b"traceparent")
            tracing.record(generation.times(), {} if parent is None else {"traceparent": parent})
        except Exception:
            LOG.warning("the span of request %s was not recorded", generation.request_id, exc_info=True)

    def usage(self, generation: Generation, num_reasoning: int = 0) -> dict[str, Any]:
        """The usage at the end; as in vLLM, with the tokens of reasoning if there is a dialect for it."""
        has_reasoning = self.dialects.reasoning is not None
        details = {"completion_tokens_details": {"reasoning_tokens": num_reasoning}} if has_reasoning else {}
        cached = {"prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens}}
        return usage_of(generation.num_prompt_tokens, generation.num_tokens) | cached | details

    async def _prepare_chat(self) -> None:
        """Starts the process of the chat template. A checkpoint without one is served; a given one must compile."""
        if self.chat is None:
            return
        try:
            await asyncio.to_thread(self.chat.check_template, self.chat_template)
        except ChatTemplateError as error:
            if self.chat_template is not None:
                raise
            LOG.warning("/v1/chat/completions is refused: %s", error)

    def _on_load(self, load: Load) -> None:
        self.metrics.update_load(load)


@contextmanager
def tokenizer_reader(folder: Path) -> Iterator[Callable[[int], Tokenizer | None]]:
    """Starts the probe of the tokenizer. The function returns it for prompts of so many tokens; None without a file."""
    if not (folder / "tokenizer.json").exists():
        yield lambda max_tokens: None
        return
    with closing(start_probe(folder)) as probe:
        yield lambda max_tokens: Tokenizer.from_folder(folder, probe, max_tokens)


def _fingerprint(settings: ServerSettings) -> str:
    return f"sagellm-{__version__}-{hashlib.sha256(settings.model.encode()).hexdigest()[:8]}"


def _read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SageError(f"chat_template must be a file with a Jinja template: {error}") from None


def _template_kwargs(text: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        value = None
    if not isinstance(value, dict):
        raise SageError(f"default_chat_template_kwargs must be a JSON object, got {text!r}")
    return value
