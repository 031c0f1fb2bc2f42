"""From the body of a request to token ids and sampling parameters, with vLLM's rules and messages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sageLLM.runtime.engine.chat import ChatPrompts
from sageLLM.runtime.errors import PromptError, RequestError
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.server.bodies import ChatBody, CompletionBody, Sampled
from sageLLM.runtime.server.errors import ApiError
from sageLLM.runtime.server.messages import Ready
from sageLLM.runtime.server.structured import structured_params
from sageLLM.runtime.text.tokenizer import Tokenizer

MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 4
MAX_NAME_LEN = 128
DEFAULT_COMPLETION_TOKENS = 16
LONG_TEXT = 16_384
"""Characters from which a text is tokenised in a thread, so that other requests are not held up."""

PromptSource = str | list[int]


@dataclass(frozen=True, slots=True)
class EnginePrompt:
    """One prompt with its parameters; `text` is None for a prompt of token ids.

    `kept_ids` are special tokens that are part of the answer's text, as marks of a dialect.
    """

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    kept_ids: frozenset[int] = frozenset()


def completion_prompts(prompt: str | list[Any] | None) -> list[PromptSource]:
    """The prompts of a completion: a text, token ids, or a list of either. Raises ApiError 400."""
    if prompt is None or prompt == "" or prompt == []:
        raise ApiError(400, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(prompt, str):
        return [prompt]
    if all(type(one) is int for one in prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise ApiError(400, f"prompt must have at most {MAX_PROMPTS} prompts, got {len(prompt)}", "prompt")
    for i, one in enumerate(prompt):
        is_ids = isinstance(one, list) and all(type(token) is int for token in one)
        if not (isinstance(one, str) or is_ids):
            raise ApiError(400, f"prompt[{i}] must be a text or a list of token ids", "prompt")
        if not one:
            raise ApiError(400, "Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    return prompt


def estimated_tokens(sources: Sequence[PromptSource], chars_per_token: int) -> int:
    return sum(len(one) // chars_per_token if isinstance(one, str) else len(one) for one in sources)


async def tokenize(
    tokenizer: Tokenizer | None, source: PromptSource, add_special_tokens: bool, truncate: int | None
) -> list[int]:
    """The token ids; the last `truncate` ones if that is set."""
    if isinstance(source, list):
        ids = source
    elif tokenizer is None:
        raise ApiError(
            400, "a text prompt requires the tokenizer; the server runs without one, pass token ids", "prompt"
        )
    elif len(source) < LONG_TEXT:
        ids = tokenizer.encode(source, add_special_tokens)
    else:
        ids = await asyncio.to_thread(tokenizer.encode, source, add_special_tokens)
    return ids if truncate is None or truncate < 0 else ids[-truncate:] if truncate else []


def check_common(body: Sampled, model_names: Sequence[str], policy: str) -> None:
    """Rules that no other part checks."""
    check_model(body.model, model_names)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "Stream options can only be defined when `stream=True`.", "stream_options")
    if body.prompt_logprobs is not None and body.stream and body.prompt_logprobs != 0:
        raise ApiError(400, "`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if isinstance(body.stop, list) and len(body.stop) > MAX_STOP_STRINGS:
        raise ApiError(400, f"stop must have at most {MAX_STOP_STRINGS} strings, got {len(body.stop)}", "stop")
    if body.priority and policy != "priority":
        raise ApiError(
            400,
            f"priority must be 0 unless the server runs with --scheduling-policy priority, got policy {policy}",
            "priority",
        )
    if body.deadline is not None and not body.deadline > 0:
        raise ApiError(400, f"deadline must be a number of seconds above 0, got {body.deadline:g}", "deadline")
    if body.truncate_prompt_tokens is not None and body.truncate_prompt_tokens < -1:
        raise ApiError(400, "truncate_prompt_tokens must be at least -1", "truncate_prompt_tokens")
    salt = body.cache_salt
    if salt is not None and (not salt or len(salt) > MAX_NAME_LEN or any(char in "@/\\\0" for char in salt)):
        raise ApiError(400, f"cache_salt must have 1 to {MAX_NAME_LEN} characters without @ / \\ and NUL", "cache_salt")
    for name, text in (("tenant", body.tenant), ("request_id", body.request_id or "")):
        if len(text) > MAX_NAME_LEN:
            raise ApiError(400, f"{name} must have at most {MAX_NAME_LEN} characters, got {len(text)}", name)
    if abs(body.priority) >= 2**31:
        raise ApiError(400, "priority must have 32 bits", "priority")


def check_model(model: str | None, names: Sequence[str]) -> None:
    if model and model not in names:
        raise ApiError(404, f"The model `{model[:200]}` does not exist.", "model")


def make_params(
    body: Sampled, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """Sampling parameters; fields that the body leaves out come from the model's defaults. Raises RequestError."""
    given: dict[str, Any] = {
        "n": body.n,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "seed": body.seed,
        "stop": body.stop,
        "stop_token_ids": body.stop_token_ids,
        "logit_bias": _logit_bias(body.logit_bias),
        "structured_outputs": structured_params(body.structured_outputs, body.response_format),
    }
    return replace(
        defaults,
        **{name: value for name, value in given.items() if value is not None},
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        ignore_eos=body.ignore_eos,
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
    )


def _logit_bias(biases: Mapping[str, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise ApiError(400, "the keys of logit_bias must be token ids", "logit_bias") from None


def completion_params(body: CompletionBody, defaults: SamplingParams, max_logprobs: int) -> SamplingParams:
    check_logprobs("logprobs", body.logprobs, max_logprobs)
    check_logprobs("prompt_logprobs", body.prompt_logprobs, max_logprobs)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and body.echo:
        max_tokens = 1  # computes the scores of the prompt; the answer is dropped
    scored = body.prompt_logprobs
    if body.echo and body.logprobs is not None and scored is None:
        scored = body.logprobs
    return make_params(body, defaults, max_tokens, body.logprobs, scored)


def chat_params(body: ChatBody, defaults: SamplingParams, max_logprobs: int) -> SamplingParams:
    check_logprobs("top_logprobs", body.top_logprobs, max_logprobs)
    check_logprobs("prompt_logprobs", body.prompt_logprobs, max_logprobs)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return make_params(body, defaults, max_tokens, logprobs, body.prompt_logprobs)


def check_logprobs(name: str, value: int | None, most: int) -> None:
    if value is None:
        return
    if value < 0:
        raise ApiError(400, f"`{name}` must be a positive value.", name)
    if value > most:
        raise ApiError(400, f"Requested {name} of {value}, which is greater than max allowed: {most}", name)


def check_length(num_prompt: int, max_tokens: int | None, ready: Ready, param: str) -> None:
    """Refuses what does not fit the model. Raises ApiError 400."""
    longest = ready.max_model_len
    if num_prompt >= longest:
        raise ApiError(
            400,
            f"This model's maximum context length is {longest} tokens. However, your request has {num_prompt} input "
            "tokens. Please reduce the length of the input messages.",
            param,
        )
    if max_tokens is not None and num_prompt + max_tokens > longest:
        raise ApiError(
            400,
            f"'max_tokens' or 'max_completion_tokens' is too large: {max_tokens}. This model's maximum context length "
            f"is {longest} tokens and your request has {num_prompt} input tokens ({max_tokens} > {longest} - "
            f"{num_prompt}).",
            "max_tokens",
        )


async def render_chat(
    chat: ChatPrompts | None,
    messages: list[Any],
    *,
    template: str | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    variables: Mapping[str, Any] | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, list[int]]:
    """The prompt's text and token ids. Raises RequestError and ChatTemplateError."""
    if chat is None:
        raise ApiError(400, "chat requires the tokenizer; the server runs without one", "messages")
    if not messages:
        raise PromptError("messages must have at least one message", "messages")
    if not all(isinstance(message, dict) for message in messages):
        raise RequestError("messages must be a list of {'role', 'content'} objects", "messages")

    def render() -> tuple[str, list[int]]:
        [prompt], _ = chat.render(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools or None,
            chat_template_kwargs=variables,
        )
        return prompt["prompt"], prompt["prompt_token_ids"]

    # The template runs in a process, which is waited for.
    return await asyncio.to_thread(render)


def template_variables(body: ChatBody, defaults: Mapping[str, object]) -> dict[str, Any]:
    variables: dict[str, Any] = dict(defaults)
    if body.reasoning_effort is not None:
        variables |= {"reasoning_effort": body.reasoning_effort, "enable_thinking": body.reasoning_effort != "none"}
    if body.documents is not None:
        variables["documents"] = body.documents
    return variables | (body.chat_template_kwargs or {})
