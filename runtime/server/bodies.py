"""Bodies of requests: their fields with vLLM's names and defaults, and strict decoding.

An unknown field is an error that names the nearest known one. `IGNORED` fields are accepted, as they change nothing
that this server computes. `REFUSED` fields are known and have no implementation, so any value but the default is an
error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from sageLLM.runtime.scheduler.plan import Role
from sageLLM.runtime.server.errors import ApiError

T = TypeVar("T")


class StreamOptions(Struct, kw_only=True):
    """`include_obfuscation` is accepted: this server pads no events."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Sampled(Struct, kw_only=True):
    """The fields of all requests that generate text."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    skip_special_tokens: bool = True
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = None
    echo: bool = False
    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


class CompletionBody(Sampled, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[Any] | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatBody(Sampled, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True


class ResponsesBody(Struct, kw_only=True):
    """The body of /v1/responses."""

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    priority: int = 0
    deadline: float | None = None
    tenant: str = ""
    cache_salt: str | None = None


class MessagesBody(Struct, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: int
    messages: list[Any]
    model: str | None = None
    system: str | list[Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountTokensBody(Struct, kw_only=True):
    """The body of /v1/messages/count_tokens."""

    messages: list[Any]
    model: str | None = None
    system: str | list[Any] | None = None
    thinking: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None


class TokenizeBody(Struct, kw_only=True):
    """The body of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Struct, kw_only=True):
    """The body of /detokenize."""

    tokens: list[int]
    model: str | None = None


class EmbeddingBody(Struct, kw_only=True):
    """The body of /v1/embeddings."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: str = "float"
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    normalize: bool | None = None


class RoleBody(Struct, kw_only=True):
    """The body of /v1/workers/{number}/role."""

    role: Role


IGNORED = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "session_id",
        "include_reasoning",
        "parallel_tool_calls",
        "spaces_between_special_tokens",
        "stream_interval",
        "verbosity",
        "length_penalty",
        "include",
        "stream_options",
        "cache_control",
        "inference_geo",
        "speed",
    }
)

# Values that mean "off", besides null.
_OFF: tuple[object, ...] = ([], {}, "", False)
_NO_TOOLS = "only /v1/chat/completions and /v1/responses take tools"
REFUSED: Mapping[str, str] = {
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": "use tools",
    "function_call": "use tool_choice",
    "suffix": "filling in before a suffix is not implemented",
    "best_of": "use n",
    "use_beam_search": "beam search is not implemented",
    "bad_words": "use logit_bias to ban tokens",
    "allowed_token_ids": "use logit_bias to ban tokens",
    "logprob_token_ids": "use logprobs",
    "prompt_embeds": "pass a text or token ids",
    "repetition_detection": "use repetition_penalty",
    "thinking_token_budget": "use max_tokens",
    "kv_transfer_params": "this server computes prefill and decode itself",
    "vllm_xargs": "remove it; further arguments are those of this interface",
    "modalities": "only text is supported",
    "audio": "only text is supported",
    "prediction": "only sampling token by token is implemented",
    "web_search_options": "the server reaches no network",
    "chat_template": "a template comes from the checkpoint or from --chat-template, never from a request",
}
# Values of refused fields that ask for what the server does anyway.
_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "tool_choice": ("none", "auto"),
    "best_of": (1,),
    "modalities": (["text"],),
}
REMOVED = re.compile(r"guided_(json|regex|choice|grammar|json_object|decoding_backend|whitespace_pattern)")


def load_json(data: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError 400."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body must be JSON: {text}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    if is_deeper(value, max_depth):
        raise ApiError(400, f"the body must be nested at most {max_depth} levels deep")
    return value


def is_deeper(value: object, max_depth: int) -> bool:
    """Whether objects and lists are nested in more than `max_depth` levels."""
    level: list[Any] = [value]
    for _ in range(max_depth + 1):
        if not level:
            return False
        children: list[Any] = []
        for one in level:
            values = one.values() if isinstance(one, dict) else one
            children += [child for child in values if isinstance(child, dict | list)]
        level = children
    return bool(level)


def decode_body(values: dict[str, Any], kind: type[T], *, is_lenient: bool) -> tuple[T, list[str]]:
    """The body, and the names of the fields that are ignored. Raises ApiError 400."""
    known = kind.__struct_fields__  # type: ignore[attr-defined]
    ignored, taken = [], {}
    for name, value in values.items():
        if name in known:
            # null means the default, as clients send it for what the user has not set
            if value is not None:
                taken[name] = value
        elif name in IGNORED:
            ignored.append(name)
        elif name in REFUSED:
            _refuse(name, value, ignored)
        elif is_lenient:
            ignored.append(name)
        else:
            raise ApiError(400, _unknown(name, known), name)
    options = taken.get("stream_options")
    for name in options if isinstance(options, dict) else ():
        if name not in StreamOptions.__struct_fields__ and not is_lenient:
            raise ApiError(400, f"stream_options: {_unknown(name, StreamOptions.__struct_fields__)}", "stream_options")
    try:
        return msgspec.convert(taken, kind), ignored
    except msgspec.ValidationError as error:
        raise _invalid(error) from None


def _refuse(name: str, value: object, ignored: list[str]) -> None:
    if value is None or any(value == off and type(value) is type(off) for off in _OFF):
        return
    if value in _HARMLESS.get(name, ()):
        ignored.append(name)
        return
    raise ApiError(400, f"{name} is not supported: {REFUSED[name]}", name)


def _unknown(name: str, known: tuple[str, ...]) -> str:
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    if REMOVED.fullmatch(name):
        return f"unknown field '{shown}': vLLM has removed it; its successor is 'structured_outputs'"
    near = difflib.get_close_matches(name[:60], [*known, *IGNORED, *REFUSED], n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(known))}"
    return f"unknown field '{shown}'; {hint}"


def _invalid(error: msgspec.ValidationError) -> ApiError:
    """`Expected X, got Y - at $.field` as a sentence that begins with the field."""
    text, _, path = str(error).partition(" - at `$")
    field = path.rstrip("`").lstrip(".")
    if match := re.search(r"missing required field `(\w+)`", text):
        return ApiError(400, f"{match[1]} is required", match[1])
    message = (text[0].lower() + text[1:]).replace("`", "")
    return ApiError(400, f"{field}: {message}" if field else message, field.partition("[")[0].partition(".")[0] or None)
