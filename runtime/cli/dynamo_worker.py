"""`sagellm dynamo-worker`: an engine as a worker of NVIDIA Dynamo.

Dynamo's frontend renders templates, tokenises, detokenises and finds stop strings; a worker computes token ids. The
engine runs in a process, as that of `sagellm serve`. Written for `dynamo.common.backend` of ai-dynamo 1.6.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from sageLLM.runtime.cli.engine_options import EngineOptions
from sageLLM.runtime.cli.serve_engine import EngineSpec, encode_spec
from sageLLM.runtime.engine.kv_events import read_config
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.server.channel import ProcessChannel
from sageLLM.runtime.server.engine_client import EngineClient, Inbox
from sageLLM.runtime.server.messages import Delta, HandoffSpec, Ready, Submit

if TYPE_CHECKING:
    from sageLLM.runtime.server.channel import Channel

ENGINE = "sageLLM.runtime.cli.serve_engine"
TICKET = "kv_ticket"
"""The field of Dynamo's `disaggregated_params` with the ticket for the KV of a prompt."""
SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - {"n", "stop", "structured_outputs"}


@dataclass(frozen=True, slots=True)
class WorkerRequest:
    """The arguments of `sagellm dynamo-worker`."""

    model: str
    served_model_name: str | None
    namespace: str
    component: str
    endpoint: str
    discovery_backend: str
    request_plane: str
    event_plane: str | None
    endpoint_types: str
    disaggregation_mode: Literal["agg", "prefill", "decode"]
    kv_host: str
    engine: EngineOptions

    def handoff(self) -> HandoffSpec | None:
        """How the engine exchanges the KV of prompts."""
        if self.disaggregation_mode == "agg":
            return None
        return HandoffSpec(self.disaggregation_mode, self.kv_host, self.engine.kv_load_failure_policy)


def run_dynamo_worker(request: WorkerRequest) -> int:
    """Serves until a signal; returns the exit code. Errors go to stderr."""
    try:
        from dynamo.common.backend.run import run
        from dynamo.common.backend.worker import WorkerConfig
        from dynamo.common.constants import DisaggregationMode
    except ModuleNotFoundError as error:
        print(f"error: `sagellm dynamo-worker` requires {error.name}; pip install 'sagellm[dynamo]'", file=sys.stderr)
        return 1
    name = request.served_model_name or request.model
    config = WorkerConfig(
        namespace=request.namespace,
        component=request.component,
        endpoint=request.endpoint,
        model_name=request.model,
        served_model_name=name,
        endpoint_types=request.endpoint_types,
        discovery_backend=request.discovery_backend,
        request_plane=request.request_plane,
        event_plane=request.event_plane,
        enable_kv_routing=read_config(request.engine.kv_events_config) is not None,
        disaggregation_mode=DisaggregationMode(request.disaggregation_mode),
    )

    async def make(_: list[str] | None) -> tuple[Any, Any]:
        return make_engine(request, name), config

    run(object, [], make)
    return 0


def make_engine(request: WorkerRequest, name: str) -> Any:
    """The engine with the methods of Dynamo's contract."""
    from dynamo.common.backend.engine import EngineConfig, LLMEngine, LlmRegistration

    class SageEngine(LLMEngine):  # type: ignore[misc]
        """Passes requests to the engine process, and its tokens back."""

        def __init__(self) -> None:
            spec = EngineSpec(request.model, request.engine, handoff=request.handoff())

            def make_channel() -> Channel:
                return ProcessChannel(ENGINE, encode_spec(spec))

            self._client = EngineClient(make_channel)
            self._ids: dict[str, str] = {}

        @classmethod
        async def from_args(cls, argv: list[str] | None = None) -> Any:
            raise NotImplementedError("the command makes the engine")

        async def start(self, worker_id: int) -> Any:
            ready: Ready = await self._client.start()
            registration = LlmRegistration(
                context_length=ready.max_model_len,
                kv_cache_block_size=ready.block_size,
                total_kv_blocks=ready.num_kv_blocks,
                max_num_seqs=ready.max_num_seqs,
                max_num_batched_tokens=request.engine.max_num_batched_tokens,
            )
            return EngineConfig(model=request.model, served_model_name=name, llm=registration)

        async def kv_event_sources(self) -> list[Any]:
            """The address of the engine's KV events, if it publishes them, for the router's prefix matches."""
            from dynamo.common.backend.publisher import ZmqSource

            events = read_config(request.engine.kv_events_config)
            return (
                [] if events is None else [ZmqSource(endpoint=subscriber_address(events.endpoint), topic=events.topic)]
            )

        async def generate(self, asked: Mapping[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
            token_ids = list(asked["token_ids"])
            own = self._client.new_id()
            self._ids[context.id()] = own
            inbox = Inbox()
            num_tokens = num_cached = 0
            try:
                self._client.submit(submission(own, asked, request.disaggregation_mode), inbox)
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

    return SageEngine()


def subscriber_address(endpoint: str) -> str:
    """The address to connect to, for one that the engine binds to."""
    return endpoint.replace("*", "127.0.0.1")


def submission(own_id: str, asked: Mapping[str, Any], mode: str) -> Submit:
    """A request of Dynamo's for the engine. A prefill worker samples one token, which the decode worker does again.

    A decode worker gets the ticket for the KV of the prompt; without one, it computes the prompt.
    """
    params = sampling_params(asked)
    if mode == "prefill":
        params = replace(params, max_tokens=1, min_tokens=0)
    handed_over = (asked.get("prefill_result") or {}).get("disaggregated_params") or {}
    ticket = handed_over.get(TICKET) if mode == "decode" else None
    return Submit(own_id, list(asked["token_ids"]), params, kv_ticket=ticket or "")


def sampling_params(asked: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a request of Dynamo's. Raises SageError for one that the engine does not have."""
    sampling, stops = asked.get("sampling_options") or {}, asked.get("stop_conditions") or {}
    if sampling.get("guided_decoding") is not None:
        raise SageError("guided_decoding is not available for Dynamo's workers; omit response_format and guided fields")
    if (sampling.get("n") or 1) > 1:
        raise SageError(f"n must be 1, got {sampling['n']}")
    given = {name: value for name, value in sampling.items() if name in SAMPLING and value is not None}
    ends: Sequence[int] = [*(stops.get("stop_token_ids") or []), *(stops.get("stop_token_ids_hidden") or [])]
    ignores = bool(stops.get("ignore_eos"))
    if not ignores:
        ends = [*ends, *(asked.get("eos_token_ids") or [])]
    return SamplingParams(
        **given,
        max_tokens=stops.get("max_tokens"),
        min_tokens=stops.get("min_tokens") or 0,
        stop_token_ids=ends or None,
        ignore_eos=ignores,
    )


def chunk_of(delta: Delta, num_prompt_tokens: int, num_tokens: int, num_cached: int = 0) -> dict[str, Any]:
    """New tokens as a chunk of Dynamo's; the last one has the reason of the end, and the usage.

    `num_cached` tokens of the prompt were in the cache, or have come from a prefill worker.
    """
    chunk: dict[str, Any] = {"token_ids": list(delta.token_ids), "index": delta.index}
    if delta.finish_reason is not None:
        chunk["finish_reason"] = "cancelled" if delta.finish_reason == "abort" else delta.finish_reason
        total = num_prompt_tokens + num_tokens
        usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}
        chunk["completion_usage"] = usage | {"prompt_tokens_details": {"cached_tokens": num_cached}}
    if delta.kv_ticket is not None:
        chunk["disaggregated_params"] = {TICKET: delta.kv_ticket}
    return chunk
