"""Validates a request against the model: prompt, token ids, sampling parameters and stop rules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sageLLM.runtime.errors import PromptError, SamplingParamsError
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.text.stop import StopRules


def validate_prompt(token_ids: Sequence[int], vocab_size: int, max_model_len: int, *, generates: bool = True) -> None:
    """Raises PromptError for a prompt that is empty, too long, or has an id outside [0, vocab_size).

    For a model that `generates`, the prompt must leave one position for a new token.
    """
    if not token_ids:
        raise PromptError("the prompt must have at least one token", "prompt")
    longest = max_model_len - 1 if generates else max_model_len
    if len(token_ids) > longest:
        reason = f", one less than its {max_model_len} positions" if generates else ""
        raise PromptError(
            f"the prompt must have at most {longest} tokens for this model{reason}, got {len(token_ids)}", "prompt"
        )
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):  # True is an int in Python, not a token id
            kind = type(token_id).__name__
            raise PromptError(f"prompt token {position} must be an integer, got a {kind}", "prompt")
        if not 0 <= token_id < vocab_size:
            shown = token_id if token_id.bit_length() <= 128 else f"an integer of {token_id.bit_length()} bits"
            raise PromptError(
                f"prompt token {position} must be from 0 to {vocab_size - 1} for this model, got {shown}", "prompt"
            )


def validate_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises SamplingParamsError for stop ids and biased ids outside the model's vocabulary."""
    _check_ids("stop_token_ids", params.stop_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias or (), vocab_size)


def check_kv_room(params: SamplingParams, prompt_len: int, kv_room: int | None, max_model_len: int) -> None:
    """Refuses a request that would end early because the KV cache cannot hold it even when it is alone.

    `kv_room` are the tokens that the cache holds; None for no limit. Raises PromptError or SamplingParamsError.
    """
    if kv_room is None:
        return
    if prompt_len >= kv_room:
        raise PromptError(
            f"the prompt must have at most {kv_room - 1} tokens, one less than the KV cache holds, got {prompt_len}; "
            "raise num_kv_blocks",
            "prompt",
        )
    max_tokens = resolve_max_tokens(params, prompt_len, max_model_len)
    if params.max_tokens is not None and prompt_len + max_tokens > kv_room:
        raise SamplingParamsError(
            f"prompt and answer must fit the {kv_room} tokens of the KV cache, got {prompt_len} + {max_tokens}; "
            "lower max_tokens, or raise num_kv_blocks",
            "max_tokens",
        )


def resolve_max_tokens(params: SamplingParams, prompt_len: int, max_model_len: int) -> int:
    """The most tokens that the answer can have: `max_tokens`, limited to the positions after the prompt."""
    room = max_model_len - prompt_len
    return room if params.max_tokens is None else min(params.max_tokens, room)


def stop_rules(params: SamplingParams, eos_ids: frozenset[int], prompt_len: int, max_model_len: int) -> StopRules:
    """The rules that end an answer to a prompt of `prompt_len` tokens."""
    return StopRules(
        eos_ids=frozenset() if params.ignore_eos else eos_ids,
        stop_ids=frozenset(params.stop_ids),
        stop_strings=params.stop_strings,
        keeps_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
        max_tokens=resolve_max_tokens(params, prompt_len, max_model_len),
    )


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise SamplingParamsError(
                f"{field} must hold token ids from 0 to {vocab_size - 1} for this model, got {token_id}", field
            )
