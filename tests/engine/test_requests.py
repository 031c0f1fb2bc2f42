"""Validation of prompts and parameters against a model, with the exact message of each error."""

from __future__ import annotations

import pytest

from sageLLM.runtime.engine.requests import resolve_max_tokens, validate_params, validate_prompt
from sageLLM.runtime.errors import PromptError, SamplingParamsError
from sageLLM.runtime.sampling.sampling_params import SamplingParams

BAD_PROMPTS = [
    ([], "the prompt must have at least one token"),
    ([1, 100], "prompt token 1 must be from 0 to 99 for this model, got 100"),
    ([-1], "prompt token 0 must be from 0 to 99 for this model, got -1"),
    ([2**63], "prompt token 0 must be from 0 to 99 for this model, got 9223372036854775808"),
    ([10**5000], "prompt token 0 must be from 0 to 99 for this model, got an integer of 16610 bits"),
    ([1, 2.0], "prompt token 1 must be an integer, got a float"),
    ([True], "prompt token 0 must be an integer, got a bool"),
    (
        [1] * 8,
        "the prompt must have at most 7 tokens for this model, one less than its 8 positions, got 8",
    ),
]


@pytest.mark.parametrize(("token_ids", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompt_is_refused(token_ids, message):
    with pytest.raises(PromptError) as caught:
        validate_prompt(token_ids, vocab_size=100, max_model_len=8)
    assert str(caught.value) == message
    assert caught.value.param == "prompt"


def test_longest_prompt_and_outermost_ids_are_accepted():
    validate_prompt([0, 99, 0, 0, 0, 0, 99], vocab_size=100, max_model_len=8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            SamplingParams(stop_token_ids=[100]),
            "stop_token_ids must hold token ids from 0 to 99 for this model, got 100",
        ),
        (SamplingParams(logit_bias={100: 1.0}), "logit_bias must hold token ids from 0 to 99 for this model, got 100"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(params, message):
    with pytest.raises(SamplingParamsError) as caught:
        validate_params(params, vocab_size=100)
    assert str(caught.value) == message


def test_max_tokens_is_limited_to_the_positions_after_the_prompt():
    assert resolve_max_tokens(SamplingParams(max_tokens=5), prompt_len=4, max_model_len=8) == 4
    assert resolve_max_tokens(SamplingParams(max_tokens=3), prompt_len=4, max_model_len=8) == 3
    assert resolve_max_tokens(SamplingParams(max_tokens=None), prompt_len=4, max_model_len=8) == 4
