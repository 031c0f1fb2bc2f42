"""Sampling parameters: defaults, normalised values, and the exact message of each error."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sageLLM.runtime.errors import RequestError, SamplingParamsError
from sageLLM.runtime.sampling.sampling_params import SamplingParams


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
        "structured_outputs": None,
    }


BAD_VALUES = [
    ("n", 0, "n must be an integer from 1 to 128, got 0"),
    ("n", True, "n must be an integer from 1 to 128, got True"),
    ("n", 2**63, "n must be an integer from 1 to 128, got 9223372036854775808"),
    ("n", 10**5000, "n must be an integer from 1 to 128, got an integer of 16610 bits"),
    ("temperature", math.nan, "temperature must be a number from 0 to 100, got nan"),
    ("temperature", math.inf, "temperature must be a number from 0 to 100, got inf"),
    ("temperature", -0.1, "temperature must be a number from 0 to 100, got -0.1"),
    ("temperature", "hot", "temperature must be a number from 0 to 100, got 'hot'"),
    ("temperature", 10**400, "temperature must be a number from 0 to 100, got an integer of 1329 bits"),
    ("temperature", None, "temperature must be a number from 0 to 100, got None"),
    ("top_p", 0.0, "top_p must be a number above 0 and at most 1, got 0.0"),
    ("top_p", 1.5, "top_p must be a number above 0 and at most 1, got 1.5"),
    ("top_p", math.nan, "top_p must be a number above 0 and at most 1, got nan"),
    ("top_k", -2, "top_k must be an integer from 0 to 2147483647, or -1, got -2"),
    ("top_k", 1.0, "top_k must be an integer from 0 to 2147483647, or -1, got 1.0"),
    ("min_p", -0.5, "min_p must be a number from 0 to 1, got -0.5"),
    ("min_p", math.nan, "min_p must be a number from 0 to 1, got nan"),
    (
        "seed",
        2**63,
        "seed must be an integer from -9223372036854775808 to 9223372036854775807, got 9223372036854775808",
    ),
    ("max_tokens", 0, "max_tokens must be an integer from 1 to 2147483647, got 0"),
    ("max_tokens", -1, "max_tokens must be an integer from 1 to 2147483647, got -1"),
    ("min_tokens", -1, "min_tokens must be an integer from 0 to 2147483647, got -1"),
    ("min_tokens", 17, "min_tokens must be at most max_tokens, which is 16, got 17"),
    ("stop", "", "stop[0] must be a string of 1 to 1024 characters, got ''"),
    ("stop", ["a", ""], "stop[1] must be a string of 1 to 1024 characters, got ''"),
    ("stop", ["a", 3], "stop[1] must be a string of 1 to 1024 characters, got 3"),
    (
        "stop",
        "x" * 1025,
        "stop[0] must be a string of 1 to 1024 characters, got '" + "x" * 59 + "...",
    ),
    ("stop", ["a"] * 65, "stop must have at most 64 strings, got 65"),
    ("stop", {"a": 1}, "stop must be a string or a list, got a dict"),
    ("stop_token_ids", [1, -1], "stop_token_ids[1] must be an integer from 0 to 2147483647, got -1"),
    ("stop_token_ids", [0] * 1025, "stop_token_ids must have at most 1024 ids, got 1025"),
    ("stop_token_ids", "12", "stop_token_ids must be a list of token ids, got '12'"),
    ("ignore_eos", 1, "ignore_eos must be True or False, got 1"),
    ("logprobs", 21, "logprobs must be an integer from 0 to 20, got 21"),
    ("logprobs", True, "logprobs must be an integer from 0 to 20, got True"),
    ("prompt_logprobs", -1, "prompt_logprobs must be an integer from 0 to 20, got -1"),
    ("include_stop_str_in_output", None, "include_stop_str_in_output must be True or False, got None"),
    ("skip_special_tokens", "no", "skip_special_tokens must be True or False, got 'no'"),
    ("presence_penalty", 2.1, "presence_penalty must be a number from -2 to 2, got 2.1"),
    ("frequency_penalty", -math.inf, "frequency_penalty must be a number from -2 to 2, got -inf"),
    ("repetition_penalty", 0, "repetition_penalty must be a number above 0 and at most 100, got 0"),
    ("repetition_penalty", math.nan, "repetition_penalty must be a number above 0 and at most 100, got nan"),
    ("logit_bias", [1], "logit_bias must be a mapping from token id to number, got a list"),
    ("logit_bias", {-1: 1.0}, "logit_bias[-1] must be an integer from 0 to 2147483647, got -1"),
    ("logit_bias", {5: math.nan}, "logit_bias[5] must be a number from -100 to 100, got nan"),
    ("logit_bias", dict.fromkeys(range(1025), 1.0), "logit_bias must have at most 1024 entries, got 1025"),
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
    assert str(caught.value) == "n must be 1 when temperature is 0, as all greedy answers are the same, got 4"


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
    with pytest.raises(SamplingParamsError, match="n must be an integer from 1 to 128, got 0"):
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


def test_greedy_parameters():
    assert SamplingParams(temperature=0.0).is_greedy
    assert SamplingParams(temperature=0.01).is_greedy
    assert not SamplingParams(temperature=0.011).is_greedy
    assert SamplingParams(top_k=1).is_greedy
    assert not SamplingParams(top_k=2).is_greedy
    assert SamplingParams(min_p=1.0).is_greedy
    assert not SamplingParams(min_p=0.999).is_greedy
    assert SamplingParams(temperature=1.0, top_k=1, n=2).n == 2  # accepted, as in vLLM


def test_parameters_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 3
