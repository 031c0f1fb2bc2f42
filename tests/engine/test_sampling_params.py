"""Sampling parameters: defaults, what is kept, and the exact message for each bad value."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sageLLM.runtime.engine.sampling_params import SamplingParams
from sageLLM.runtime.errors import RequestError, SamplingParamsError


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": None,
    }


BAD_VALUES = [
    ("n", 0, "n is 0; it must be an integer from 1 to 128"),
    ("n", True, "n is True; it must be an integer from 1 to 128"),
    ("n", 2**63, "n is 9223372036854775808; it must be an integer from 1 to 128"),
    ("n", 10**5000, "n is an integer of 16610 bits; it must be an integer from 1 to 128"),
    ("temperature", math.nan, "temperature is nan; it must be a number from 0 to 100"),
    ("temperature", math.inf, "temperature is inf; it must be a number from 0 to 100"),
    ("temperature", -0.1, "temperature is -0.1; it must be a number from 0 to 100"),
    ("temperature", "hot", "temperature is 'hot'; it must be a number from 0 to 100"),
    ("temperature", 10**400, "temperature is an integer of 1329 bits; it must be a number from 0 to 100"),
    ("temperature", None, "temperature is None; it must be a number from 0 to 100"),
    ("top_p", 0.0, "top_p is 0.0; it must be a number above 0 and at most 1"),
    ("top_p", 1.5, "top_p is 1.5; it must be a number above 0 and at most 1"),
    ("top_p", math.nan, "top_p is nan; it must be a number above 0 and at most 1"),
    ("top_k", -2, "top_k is -2; it must be an integer from 0 to 2147483647, or -1"),
    ("top_k", 1.0, "top_k is 1.0; it must be an integer from 0 to 2147483647, or -1"),
    ("min_p", -0.5, "min_p is -0.5; it must be a number from 0 to 1"),
    ("min_p", math.nan, "min_p is nan; it must be a number from 0 to 1"),
    (
        "seed",
        2**63,
        "seed is 9223372036854775808; it must be an integer from -9223372036854775808 to 9223372036854775807",
    ),
    ("max_tokens", 0, "max_tokens is 0; it must be an integer from 1 to 2147483647"),
    ("max_tokens", -1, "max_tokens is -1; it must be an integer from 1 to 2147483647"),
    ("min_tokens", -1, "min_tokens is -1; it must be an integer from 0 to 2147483647"),
    ("min_tokens", 17, "min_tokens is 17; it must be at most max_tokens, which is 16"),
    ("stop", "", "stop[0] is ''; it must be a string of 1 to 1024 characters"),
    ("stop", ["a", ""], "stop[1] is ''; it must be a string of 1 to 1024 characters"),
    ("stop", ["a", 3], "stop[1] is 3; it must be a string of 1 to 1024 characters"),
    (
        "stop",
        "x" * 1025,
        "stop[0] is '" + "x" * 59 + "...; it must be a string of 1 to 1024 characters",
    ),
    ("stop", ["a"] * 65, "stop has 65 strings; at most 64 are allowed"),
    ("stop", {"a": 1}, "stop is a dict; it must be a string or a list"),
    ("stop_token_ids", [1, -1], "stop_token_ids[1] is -1; it must be an integer from 0 to 2147483647"),
    ("stop_token_ids", [0] * 1025, "stop_token_ids has 1025 ids; at most 1024 are allowed"),
    ("stop_token_ids", "12", "stop_token_ids is '12'; it must be a list of token ids"),
    ("ignore_eos", 1, "ignore_eos is 1; it must be True or False"),
    ("logprobs", 21, "logprobs is 21; it must be an integer from 0 to 20"),
    ("logprobs", True, "logprobs is True; it must be an integer from 0 to 20"),
    ("prompt_logprobs", -1, "prompt_logprobs is -1; it must be an integer from 0 to 20"),
    ("include_stop_str_in_output", None, "include_stop_str_in_output is None; it must be True or False"),
    ("skip_special_tokens", "no", "skip_special_tokens is 'no'; it must be True or False"),
    ("presence_penalty", 2.1, "presence_penalty is 2.1; it must be a number from -2 to 2"),
    ("frequency_penalty", -math.inf, "frequency_penalty is -inf; it must be a number from -2 to 2"),
    ("repetition_penalty", 0, "repetition_penalty is 0; it must be a number above 0 and at most 100"),
    ("repetition_penalty", math.nan, "repetition_penalty is nan; it must be a number above 0 and at most 100"),
    ("logit_bias", [1], "logit_bias is a list; it must be a mapping from token id to number"),
    ("logit_bias", {-1: 1.0}, "logit_bias[-1] is -1; it must be an integer from 0 to 2147483647"),
    ("logit_bias", {5: math.nan}, "logit_bias[5] is nan; it must be a number from -100 to 100"),
    ("logit_bias", dict.fromkeys(range(1025), 1.0), "logit_bias has 1025 entries; at most 1024 are allowed"),
]


@pytest.mark.parametrize(
    ("field", "value", "message"), BAD_VALUES, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD_VALUES)]
)
def test_bad_value_is_refused_with_field_value_and_range(field, value, message):
    with pytest.raises(SamplingParamsError) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value) == message
    assert caught.value.param == field


def test_greedy_with_several_answers_is_refused():
    with pytest.raises(ValueError) as caught:
        SamplingParams(n=4, temperature=0.0)
    assert str(caught.value) == "n is 4; it must be 1 when temperature is 0, as greedy answers are all the same"


def test_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_mapping({"temprature": 0.5})
    assert str(caught.value) == "unknown sampling parameter 'temprature'; did you mean 'temperature'?"
    assert caught.value.param == "temprature"


def test_unknown_name_without_a_near_one_lists_the_known():
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_mapping({"zzzzz": 1})
    assert str(caught.value).startswith("unknown sampling parameter 'zzzzz'; known are n, temperature, top_p, top_k,")


def test_from_mapping_builds_and_checks():
    assert SamplingParams.from_mapping({"n": 2, "stop": "x"}) == SamplingParams(n=2, stop=["x"])
    with pytest.raises(SamplingParamsError, match="n is 0"):
        SamplingParams.from_mapping({"n": 0})


def test_equivalent_spellings_are_kept_as_one():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop_token_ids=[3, 4]).stop_ids == (3, 4)
    assert SamplingParams(temperature=1).temperature == 1.0
    assert SamplingParams(max_tokens=None).max_tokens is None


def test_numpy_numbers_become_plain_ones():
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(7))
    assert (type(params.temperature), params.temperature) == (float, 0.5)
    assert (type(params.top_k), params.top_k) == (int, 7)


def test_greedy_starts_below_the_epsilon_of_vllm():
    assert SamplingParams(temperature=0.0).is_greedy
    assert SamplingParams(temperature=9e-6).is_greedy
    assert not SamplingParams(temperature=1e-5).is_greedy


def test_parameters_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 3
