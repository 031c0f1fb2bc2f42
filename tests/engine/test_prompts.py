"""Forms of prompts and parameters: those of vLLM are accepted, all others are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sageLLM.runtime.engine.prompts import ParsedPrompt, params_per_prompt, parse_prompts, type_ids_per_prompt
from sageLLM.runtime.engine.requests import validate_prompt
from sageLLM.runtime.errors import PromptError, SamplingParamsError
from sageLLM.runtime.sampling.sampling_params import SamplingParams

IDS = ParsedPrompt(None, [5, 6])
TEXT = ParsedPrompt("ab", None)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [TEXT]),
        ("", [ParsedPrompt("", None)]),
        (["ab", [5, 6]], [TEXT, IDS]),
        ([5, 6], [IDS]),
        ((5, 6), [IDS]),
        (range(5, 7), [IDS]),
        ([np.int64(5), np.int32(6)], [IDS]),
        (np.array([5, 6]), [IDS]),
        (np.array([[5, 6], [5, 6]], np.uint8), [IDS, IDS]),
        (torch.tensor([5, 6]), [IDS]),
        (torch.tensor([[5, 6]], dtype=torch.int32), [IDS]),
        ([torch.tensor([5, 6]), np.array([5, 6])], [IDS, IDS]),
        ({"prompt": "ab"}, [TEXT]),
        ({"prompt_token_ids": [5, 6]}, [IDS]),
        ([{"prompt": "ab", "prompt_token_ids": np.array([5, 6])}], [ParsedPrompt("ab", [5, 6])]),
        ([{"prompt": "ab", "prompt_token_ids": None}], [TEXT]),
        ([], []),
        ((), []),
        (np.array([], np.int64), []),
        ([[]], [ParsedPrompt(None, [])]),
    ],
)
def test_accepted_forms(prompts: object, expected: list[ParsedPrompt]) -> None:
    found = parse_prompts(prompts)
    assert found == expected
    for prompt in found:
        assert all(type(token_id) is int for token_id in prompt.token_ids or ())


FORMS = "a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: b"ab", f"a prompt must be {FORMS}, or a list of these, got bytes; decode it to a text"),
    (lambda: bytearray(b"ab"), f"a prompt must be {FORMS}, or a list of these, got a bytearray; decode it to a text"),
    (lambda: [b"ab"], f"a prompt must be {FORMS}, got bytes; decode it to a text"),
    (lambda: memoryview(b"ab"), f"a prompt must be {FORMS}, or a list of these, got a memoryview"),
    (lambda: iter([5, 6]), f"a prompt must be {FORMS}, or a list of these, got a list_iterator"),
    (lambda: (i for i in [5, 6]), f"a prompt must be {FORMS}, or a list of these, got a generator"),
    (lambda: {5, 6}, f"a prompt must be {FORMS}, or a list of these, got a set"),
    (lambda: {"a": 1}.keys(), f"a prompt must be {FORMS}, or a list of these, got a dict_keys"),
    (lambda: None, f"a prompt must be {FORMS}, or a list of these, got null"),
    (lambda: 5, f"a prompt must be {FORMS}, or a list of these, got 5"),
    (lambda: object(), f"a prompt must be {FORMS}, or a list of these, got an object"),
    (lambda: [[5], 6], f"a prompt must be {FORMS}, got 6"),
    (lambda: [map(int, "56")], f"a prompt must be {FORMS}, got a map"),
    (lambda: np.array([0.5]), "token ids must be integers, got a ndarray of float64"),
    (lambda: torch.tensor([True]), "token ids must be integers, got a Tensor of torch.bool"),
    (lambda: np.array(5), "token ids must have one or two dimensions, got 0"),
    (lambda: torch.zeros(1, 1, 1, dtype=torch.int64), "token ids must have one or two dimensions, got 3"),
    (lambda: [np.array([[5, 6]])], "the token ids of a prompt must have one dimension, got 2"),
    (dict, "a prompt dict must have one of the keys 'prompt' and 'prompt_token_ids'"),
    (lambda: {"text": "ab"}, "a prompt dict must have the keys 'prompt' or 'prompt_token_ids', got 'text'"),
    (
        lambda: {"prompt": "ab", "multi_modal_data": {"image": 1}},
        "a prompt dict must have the keys 'prompt' or 'prompt_token_ids', got 'multi_modal_data'",
    ),
    (lambda: {"prompt": [5, 6]}, "'prompt' of a prompt dict must be a text, got a list"),
    (lambda: {"prompt_token_ids": "ab"}, "a prompt must be a list of token ids, got a str"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_forms(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PromptError, match=f"^{re.escape(message)}$") as caught:
        parse_prompts(make())
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("bad", [True, 0.5, "x", None, np.float32(1), torch.tensor(5)])
def test_elements_that_are_no_integers_are_left_to_the_validation(bad: object) -> None:
    (prompt,) = parse_prompts([[5, bad]])
    assert prompt.token_ids is not None
    with pytest.raises(PromptError, match=r"^prompt token 1 must be an integer, got a"):
        validate_prompt(prompt.token_ids, vocab_size=100, max_model_len=8)


def test_type_ids() -> None:
    assert type_ids_per_prompt(2, None) == [None, None]
    assert type_ids_per_prompt(2, [[0, 1], None]) == [[0, 1], None]
    assert type_ids_per_prompt(2, torch.tensor([[0], [1]])) == [[0], [1]]
    assert type_ids_per_prompt(1, [np.array([0, 1])]) == [[0, 1]]
    for bad, message in (
        (iter([[0]]), "type_ids must be a list with one list per prompt, got a list_iterator"),
        ([[0], [1]], "expected one list of type ids per prompt, got 2 lists for 1 prompts"),
        (["ab"], "the type ids of a prompt must be a list of integers, got a str"),
        ([5], "the type ids of a prompt must be a list of integers, got 5"),
    ):
        with pytest.raises(PromptError, match=f"^{re.escape(message)}$") as caught:
            type_ids_per_prompt(1, bad)
        assert caught.value.param == "type_ids"


ONE = SamplingParams(max_tokens=1)


def test_accepted_params() -> None:
    assert params_per_prompt(2, None) == [SamplingParams()] * 2
    assert params_per_prompt(2, ONE) == [ONE, ONE]
    assert params_per_prompt(2, (ONE, SamplingParams())) == [ONE, SamplingParams()]
    assert params_per_prompt(0, []) == []


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 2}, "expected SamplingParams, got a dict; use SamplingParams.from_mapping(...)"),
        (iter([ONE]), "expected SamplingParams, or a list of one per prompt, got a list_iterator"),
        (5, "expected SamplingParams, or a list of one per prompt, got 5"),
        ([{"max_tokens": 2}], "expected SamplingParams for prompt 0, got a dict"),
        ([None], "expected SamplingParams for prompt 0, got null"),
        ([ONE, ONE], "expected one SamplingParams, or one per prompt, got 2 for 1 prompts"),
    ],
)
def test_refused_params(params: object, message: str) -> None:
    with pytest.raises(SamplingParamsError, match=f"^{re.escape(message)}$"):
        params_per_prompt(1, params)
