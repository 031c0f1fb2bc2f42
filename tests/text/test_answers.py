"""Texts of `LLM` on a checkpoint with a sentencepiece-style tokenizer, which drops the space that begins a text."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import transformers

from sageLLM import LLM, SamplingParams
from sageLLM.runtime.text.tokenizer import Tokenizer

PROMPT = "the tree"
NEW = ["▁th", "th", "▁a"]


@pytest.fixture(scope="module")
def llm(make_checkpoint, sentencepiece_like) -> LLM:
    folder = make_checkpoint("Llama", vocab_size=320)
    sentencepiece_like._backend.save(str(folder / "tokenizer.json"))
    return LLM(folder, dtype="float32")


def tokenizer_of(llm: LLM) -> Tokenizer:
    assert llm.tokenizer is not None
    return llm.tokenizer


def answer_with(llm: LLM, pieces: list[str], **params) -> SamplingParams:
    """Greedy parameters for which the answer consists of the pieces in any order, each once."""
    backend = tokenizer_of(llm)._backend
    bias = {backend.token_to_id(piece): 100.0 for piece in pieces}
    return SamplingParams(temperature=0, logit_bias=bias, max_tokens=len(pieces), frequency_penalty=2.0, **params)


def expected_text(llm: LLM, output) -> str:
    """decode(prompt + answer) minus decode(prompt), with the tokenizer of transformers."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(llm)._backend)
    prompt, answer = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    both = tokenizer.decode(prompt + answer, skip_special_tokens=True)
    assert both.startswith(before)
    return both[len(before) :]


def test_the_first_token_keeps_its_space(llm):
    output = llm.generate(PROMPT, answer_with(llm, ["▁th"], logprobs=0, prompt_logprobs=0))[0]
    answer = output.outputs[0]
    assert answer.text == " th" == expected_text(llm, output)
    assert [entry.decoded_token for entries in answer.logprobs for entry in entries.values()] == [" th"]
    prompt = [
        entries[token].decoded_token
        for entries, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        if entries
    ]
    assert "".join(prompt) == tokenizer_of(llm).decode(output.prompt_token_ids)[len("th") :]


def test_streams_and_stop_strings_see_the_space(llm):
    params = answer_with(llm, NEW, logprobs=2)
    streamed = [output.outputs[0].text for output in llm.stream(PROMPT, params)]
    output = llm.generate(PROMPT, params)[0]
    answer = output.outputs[0]
    assert streamed[-1] == answer.text == expected_text(llm, output)
    assert all(later.startswith(text) for text, later in pairwise(streamed))
    chosen = [entries[token] for entries, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert "".join(entry.decoded_token for entry in chosen) == answer.text
    stopped = llm.generate(PROMPT, answer_with(llm, ["▁th"], stop=[" th"]))[0].outputs[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("", "stop", " th")


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_have_the_text_of_the_definition_in_calls_and_streams(llm, skip):
    """Most of the vocabulary are bytes, which are rarely valid UTF-8, and ids that the tokenizer lacks."""
    params = SamplingParams(n=4, max_tokens=14, temperature=1.5, seed=3, ignore_eos=True, skip_special_tokens=skip)
    *_, streamed = llm.stream(PROMPT, params)
    output = llm.generate(PROMPT, params)[0]
    backend, prompt = tokenizer_of(llm)._backend, list(output.prompt_token_ids)
    before = backend.decode(prompt, skip_special_tokens=skip)
    for answer, same in zip(output.outputs, streamed.outputs, strict=True):
        both = backend.decode([*prompt, *answer.token_ids], skip_special_tokens=skip)
        assert same.text == answer.text == both.removeprefix(before)


def test_a_character_that_the_prompt_begins_is_in_the_answer(llm):
    tokenizer = tokenizer_of(llm)
    *prompt, last = tokenizer.encode("a 你好")
    params = SamplingParams(temperature=0, logit_bias={last: 100.0}, max_tokens=1, logprobs=0)
    answer = llm.generate([prompt], params)[0].outputs[0]
    assert answer.text == "好"
    assert answer.logprobs[0][last].decoded_token == "好"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("generation_config.json", {"eos_token_id": [7, 9]}),
        ("config.json", {"eos_token_id": 9}),
        ("generation_config.json", {"eos_token_id": [9, 10**6]}),
    ],
)
def test_the_end_of_sequence_ids_need_no_tokenizer(make_checkpoint, tmp_path, name, values):
    for path in make_checkpoint("Llama", vocab_size=320).iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    llm = LLM(tmp_path, dtype="float32", skip_tokenizer=True)
    params = [
        SamplingParams(temperature=0, max_tokens=5, logit_bias={9: 100.0}, **more)
        for more in ({}, {"ignore_eos": True}, {"min_tokens": 2})
    ]
    answers = [output.outputs[0] for output in llm.generate([[3, 4]] * 3, params)]
    assert (answers[0].token_ids, answers[0].finish_reason, answers[0].stop_reason) == ((9,), "stop", None)
    assert answers[1].token_ids == (9,) * 5
    assert answers[2].token_ids[2:] == (9,)
    assert 9 not in answers[2].token_ids[:2]
