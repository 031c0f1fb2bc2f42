"""Structured output through the public `LLM`: every kind, modes and preemption.

tests/parallel/test_processes.py has ranks, and workers that are lost.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sageLLM import LLM, PDSchedulerConfig, SamplingParams
from sageLLM.codegen.driver import PACKAGE
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.errors import RequestError
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
MIB = 2**-10
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["class", "function"]},
        "lines": {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 4, "maxItems": 4},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
PROMPTS = ["def main(", "class Tree:", "import os\n", "x = "]


def params(max_tokens: int = 80, **fields: Any) -> SamplingParams:
    form = fields.pop("structured_outputs", StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True))
    return SamplingParams(max_tokens=max_tokens, structured_outputs=form, **fields)


PARAMS = [params(temperature=0), params(temperature=1.0, seed=1), params(temperature=1.5, seed=2, n=2), params(seed=3)]


def load(mode: str = "hybrid", **options: Any) -> LLM:
    config = PDSchedulerConfig(mode=mode, **options.pop("scheduler", {}))
    return LLM(MODEL, dtype="float32", scheduler=config, **options)


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [answer.text for output in outputs for answer in output.outputs]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load()


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[str]:
    outputs = llm.generate(PROMPTS, PARAMS)
    for answer in (one for output in outputs for one in output.outputs):
        assert answer.finish_reason == "stop"
        assert_valid(answer.text)
    return texts(outputs)


def assert_valid(text: str) -> None:
    value = json.loads(text)
    assert list(value) == ["name", "kind", "lines"] and value["kind"] in ("class", "function")
    assert len(value["lines"]) == 4 and all(line <= 99 for line in value["lines"])


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, r"[0-9]{3}-[a-f]{2}"),
        ({"choice": ["alpha", "beta\n"]}, r"alpha|beta\n"),
        ({"grammar": 'start: "x" NUM\nNUM: /[0-9]{1,4}/'}, r"x[0-9]{1,4}"),
        ({"grammar": 'root ::= "y" [0-9] "z"'}, r"y[0-9]z"),
        ({"json": '{"type": "boolean"}'}, r"\s*(true|false)"),
    ],
)
def test_kinds(llm: LLM, form: dict[str, Any], pattern: str) -> None:
    [output] = llm.generate("def main(", params(temperature=0, structured_outputs=form))
    assert output.outputs[0].finish_reason == "stop"
    assert re.fullmatch(pattern, output.outputs[0].text), output.outputs[0].text


def test_a_tag_constrains_the_text_after_its_trigger(llm: LLM) -> None:
    call = {"begin": "self):", "schema": {"const": 17}, "end": "!"}
    form = {"structural_tag": {"structures": [call], "triggers": ["self"]}}
    [output] = llm.generate("def main(", params(12, temperature=0, structured_outputs=form))
    assert output.outputs[0].text.startswith("self):17!")


def test_an_answer_that_is_cut_says_so(llm: LLM) -> None:
    [output] = llm.generate("def main(", params(5, temperature=0))
    assert output.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(output.outputs[0].text)


def test_rows_without_a_grammar_are_not_affected(llm: LLM, expected: list[str]) -> None:
    free = SamplingParams(max_tokens=12, temperature=0)
    alone = texts(llm.generate(PROMPTS, free))
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    mixed = llm.generate(prompts, [one for pair in zip(PARAMS, [free] * 4, strict=True) for one in pair])
    assert texts(mixed[1::2]) == alone and texts(mixed[::2]) == expected


@pytest.mark.parametrize("mode", ["time_share", "strict"])
def test_modes(mode: str, expected: list[str]) -> None:
    assert texts(load(mode).generate(PROMPTS, PARAMS)) == expected


def test_without_planning_ahead(expected: list[str]) -> None:
    assert texts(load(async_scheduling=False).generate(PROMPTS, PARAMS)) == expected


@pytest.mark.parametrize("swap", [0.0, 1 * MIB])
def test_preempted_and_swapped_sequences_continue_their_grammar(swap: float, expected: list[str]) -> None:
    llm = load(num_kv_blocks=24, block_size=4, swap_space=swap)
    assert texts(llm.generate(PROMPTS, PARAMS)) == expected
    assert llm.engine.scheduler.get_stats()["total_preemptions"] > 0, "the pool was meant to be too small"
    if swap:
        assert llm.engine.kv_stats()["worker"].total_swaps_in > 0


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "must have exactly one of json, regex, choice, grammar, json_object, structural_tag, got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex, choice"),
        ({"json": "{"}, "must have a json in JSON"),
        ({"json": {"type": "strng"}}, "Invalid type: strng"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "in a pattern: .* look-around"),
        ({"regex": "("}, "invalid regex"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": 'root ::= ("a"'}, "must be Lark or GBNF"),
        ({"choice": []}, "must have a choice of 1 to 4096 texts, got 0"),
        ({"guided_json": "{}"}, "must have only the fields json, regex"),
        ({"structural_tag": {"format": {}}}, "must be an object with structures and triggers"),
        ({"structural_tag": {"structures": [{"begin": "b"}], "triggers": ["a"]}}, "must begin with one of the"),
        (
            {"structural_tag": {"structures": [{"begin": "a", "schema": {"not": {}}}], "triggers": ["a"]}},
            "the keyword 'not' at",
        ),
    ],
)
def test_refusals(llm: LLM, form: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate("x", params(structured_outputs=form))
    assert caught.value.param == "structured_outputs"


def test_min_tokens_and_ignore_eos_contradict_a_grammar() -> None:
    with pytest.raises(RequestError, match="min_tokens must be 0 with structured_outputs"):
        params(min_tokens=2)
    with pytest.raises(RequestError, match="ignore_eos must be False with structured_outputs"):
        params(ignore_eos=True)
