"""Checks a request against the model that shall serve it: prompt, token ids and room for the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.errors import PromptError, SamplingParamsError
from sageLLM.runtime.text.stop import StopRules


def validate_prompt(token_ids: Sequence[int], vocab_size: int, max_model_len: int, *, generates: bool = True) -> None:
    """Refuses a prompt that is empty, holds an id outside [0, vocab_size), or is too long.

    If the model `generates`, there must be room for one new token.
    """
    if not token_ids:
        raise PromptError("the prompt is empty; give at least one token", "prompt")
    longest = max_model_len - 1 if generates else max_model_len
    if len(token_ids) > longest:
        reason = f", as its {max_model_len} positions must hold at least one new token" if generates else ""
        raise PromptError(
            f"the prompt has {len(token_ids)} tokens; this model takes at most {longest}{reason}", "prompt"
        )
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            kind = type(token_id).__name__
            raise PromptError(f"prompt token {position} is a {kind}; token ids are integers", "prompt")
        if not 0 <= token_id < vocab_size:
            shown = token_id if token_id.bit_length() <= 128 else f"an integer of {token_id.bit_length()} bits"
            raise PromptError(
                f"prompt token {position} is {shown}; token ids of this model run from 0 to {vocab_size - 1}", "prompt"
            )


def validate_params(params: SamplingParams, vocab_size: int) -> None:
    """Refuses stop ids and biased ids that this model's vocabulary does not have."""
    _check_ids("stop_token_ids", params.stop_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias or (), vocab_size)


def resolve_max_tokens(params: SamplingParams, prompt_len: int, max_model_len: int) -> int:
    """How many tokens the answer may have: `max_tokens`, cut to the positions that the prompt leaves."""
    room = max_model_len - prompt_len
    return room if params.max_tokens is None else min(params.max_tokens, room)


def stop_rules(params: SamplingParams, eos_ids: frozenset[int], prompt_len: int, max_model_len: int) -> StopRules:
    """The stop rules of one sequence under these parameters."""
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
                f"{field} holds {token_id}; token ids of this model run from 0 to {vocab_size - 1}", field
            )
