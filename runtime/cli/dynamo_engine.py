"""Methods of an engine in the contract of NVIDIA Dynamo's workers (`dynamo.common.backend.engine` of ai-dynamo 1.6).

A worker is a subclass of this class and Dynamo's `LLMEngine`, which is imported only where Dynamo is installed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from sageLLM.runtime.cli.dynamo_requests import chunk_of, submission, subscriber_address
from sageLLM.runtime.cli.serve_engine import EngineSpec, encode_spec
from sageLLM.runtime.engine.kv_events import read_config
from sageLLM.runtime.server.channel import ProcessChannel
from sageLLM.runtime.server.engine_client import EngineClient, Inbox

if TYPE_CHECKING:
    from sageLLM.runtime.server.channel import Channel
    from sageLLM.runtime.server.messages import Ready

ENGINE = "sageLLM.runtime.cli.serve_engine"
WorkerMode = Literal["agg", "prefill", "decode"]


class DynamoEngine:
    """Passes requests to an engine process, and its tokens back."""

    def __init__(self, spec: EngineSpec, served_model_name: str, mode: WorkerMode) -> None:
        def make_channel() -> Channel:
            return ProcessChannel(ENGINE, encode_spec(spec))

        self._spec, self._name, self._mode = spec, served_model_name, mode
        self._client = EngineClient(make_channel)
        self._ids: dict[str, str] = {}

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any:
        raise TypeError("`sagellm dynamo-worker` makes the engine, from its own options")

    async def start(self, worker_id: int) -> Any:
        """Starts the process; returns what Dynamo's frontend and router must know of the engine."""
        from dynamo.common.backend.engine import EngineConfig, LlmRegistration

        ready: Ready = await self._client.start()
        registration = LlmRegistration(
            context_length=ready.max_model_len,
            kv_cache_block_size=ready.block_size,
            total_kv_blocks=ready.num_kv_blocks,
            max_num_seqs=ready.max_num_seqs,
            max_num_batched_tokens=self._spec.options.max_num_batched_tokens,
        )
        return EngineConfig(model=self._spec.model, served_model_name=self._name, llm=registration)

    async def kv_event_sources(self) -> list[Any]:
        """The address of the engine's KV events, if it publishes them, for the router's prefix matches."""
        from dynamo.common.backend.publisher import ZmqSource

        events = read_config(self._spec.options.kv_events_config)
        return [] if events is None else [ZmqSource(endpoint=subscriber_address(events.endpoint), topic=events.topic)]

    async def generate(self, asked: Mapping[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        token_ids = list(asked["token_ids"])
        own = self._client.new_id()
        self._ids[context.id()] = own
        inbox = Inbox()
        num_tokens = num_cached = 0
        try:
            self._client.submit(submission(own, asked, self._mode), inbox)
            while True:
                for delta in await inbox.take():
                    num_tokens += len(delta.token_ids)
                    num_cached = delta.num_cached_tokens or num_cached
                    yield chunk_of(delta, len(token_ids), num_tokens, num_cached)
                    if delta.finish_reason is not None:
                        return
        finally:
            self._ids.pop(context.id(), None)
            self._client.close_request(own)

    async def abort(self, context: Any) -> None:
        own = self._ids.get(context.id())
        if own is not None:
            self._client.abort_answer(own, 0)

    async def is_quiescent(self) -> bool:
        """A decode worker whose fetch is interrupted computes the prompt, so only requests are waited for."""
        return self._client.num_requests == 0

    async def cleanup(self) -> None:
        await self._client.close()
