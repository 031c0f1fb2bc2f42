"""Responses compared with those that vLLM's server recorded for the same requests (golden_requests.py).

Statuses, keys, types, finish reasons, usage, log-probabilities and greedy texts are equal, but for these differences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from golden_comparison import differences
from golden_requests import REQUESTS, Recorded, send
from servers import TestServer

RECORDED = json.loads(Path(__file__).with_name("golden").joinpath("vllm.json").read_text(encoding="utf-8"))

WHOLE = {
    "body.ec_transfer_params: missing": "an encoder in another server; always null without one",
    "body.metrics: missing": "per-request metrics are an option of vLLM; always null without it",
    "body.usage.completion_tokens_details: missing": "reasoning tokens; always null without a reasoning parser",
    "body.usage.prompt_tokens_details.created_cache_tokens: missing": "only cached tokens are counted",
    "body.usage.prompt_tokens_details.multimodal_tokens: missing": "only texts are served",
    "body.service_tier: null -> str": "'default', as OpenAI's API answers",
    "body.choices[].routed_experts: missing": "an option of vLLM; always null without it",
}
WHOLE_CHAT = WHOLE | {
    "body.prompt_text: missing": "the text of a prompt is not returned",
    "body.choices[].message.function_call: missing": "the predecessor of tool_calls, always null",
    "body.choices[].message.tool_calls: added": "clients iterate it; vLLM leaves out an empty one",
    "body.choices[].message.reasoning_content: added": "the older name of reasoning, which clients read",
    "body.choices[].message.annotations: null -> list": "an empty list, as OpenAI's API answers",
}
STREAM = {
    "stream.choices[].prompt_token_ids: missing": "present if return_token_ids is set; null without it",
    "stream.choices[].token_ids: missing": "present if return_token_ids is set; null without it",
}
STREAM_CHAT = {
    "stream.prompt_text: missing": "the text of a prompt is not returned",
    "stream.prompt_token_ids: missing": "present if return_token_ids is set; null without it",
    "stream.choices[].token_ids: missing": "present if return_token_ids is set; null without it",
}
OTHER_TOKENS = "the texts are equal; llguidance admits a token for a part of one that xgrammar divides"
BY_SCHEMA = {
    "body.usage.completion_tokens: 11 -> 10": OTHER_TOKENS,
    "body.usage.total_tokens: 14 -> 13": OTHER_TOKENS,
}
OTHER_DRAW = "a seed draws other numbers in another engine"
OF_ONE: Mapping[str, Mapping[str, str]] = {
    "models": {"body.data[].permission: 1 -> 0 entries": "permissions are not implemented"},
    "tokenize strings": {
        "body.token_strs[]: 'Ġmain' -> ' main'": "the text of a token instead of its bytes in the alphabet of GPT-2"
    },
    "completion with echo and logprobs": {
        "body.choices[].prompt_logprobs: list -> null": "present if prompt_logprobs is set; echo has them in logprobs"
    },
    "completion by a schema": BY_SCHEMA,
    "chat by a schema": BY_SCHEMA,
    "chat stream with usage": {
        "stream.usage.prompt_tokens_details.created_cache_tokens: missing": "only cached tokens are counted"
    },
}
SAMPLED = "completion with n"


def accepted(request: Recorded) -> Mapping[str, str]:
    """The differences with their reasons."""
    body = request.body or {}
    common: Mapping[str, str] = {}
    if request.path in ("/v1/completions", "/v1/chat/completions") and "error" not in request.name:
        is_chat = "chat" in request.path
        whole, stream = (WHOLE_CHAT, STREAM_CHAT) if is_chat else (WHOLE, STREAM)
        common = stream if body.get("stream") else whole
    return {**common, **OF_ONE.get(request.name, {})}


def test_there_are_40_recordings() -> None:
    assert len(REQUESTS) == 40 and RECORDED.keys() == {request.name for request in REQUESTS}


@pytest.mark.parametrize("recorded", REQUESTS, ids=[request.name for request in REQUESTS])
def test_a_response_is_that_of_vllm(server: TestServer, recorded: Recorded) -> None:
    found = differences(RECORDED[recorded.name], send(server.http, recorded))
    if recorded.name == SAMPLED:  # a seed draws other numbers in another engine
        found = [one for one in found if not one.startswith("body.choices[].text")]
    assert set(found) == accepted(recorded).keys()
