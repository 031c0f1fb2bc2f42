"""Requests of NVIDIA Dynamo for the engine, and tokens of the engine for Dynamo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.server.messages import Delta, Submit

TICKET = "kv_ticket"
"""The field of Dynamo's `disaggregated_params` with the ticket for the KV of a prompt."""
SAMPLING = frozenset(field.name for field in fields(SamplingParams)) - {"n", "stop", "structured_outputs"}


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
