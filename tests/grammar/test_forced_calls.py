"""Grammars of forced calls: what they admit, the parsers of the dialects read back; through the server too."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sageLLM.codegen.driver import PACKAGE
from sageLLM.generated.dialects import DIALECTS
from sageLLM.runtime.core.dialects.call_reader import divided
from sageLLM.runtime.core.dialects.events import CallArguments, CallStart, Event, Thought
from sageLLM.runtime.core.dialects.grammar import CannotConstrain, Constraint, call_grammar
from sageLLM.runtime.core.dialects.model import Dialect
from sageLLM.runtime.core.dialects.parser import DialectParser
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams
from sageLLM.runtime.text.tokenizer import Tokenizer

MODEL = Path(PACKAGE, "examples", "tiny_python_model")
WITH_CALLS = [dialect for dialect in DIALECTS.values() if dialect.calls is not None]
EOS = 0
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "a name ::= text"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"type": "string"}},
            "place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "stop": {},
}
MANY = 1000
CLOSING = set("\"'}])<,\n")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL, max_tokens=512)


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(MODEL, tokenizer().vocab_size, tokenizer())


@cache
def closing_tokens() -> frozenset[int]:
    """Tokens that may end a text, list or object."""
    return frozenset(one for one in range(tokenizer().vocab_size) if CLOSING & set(tokenizer().decode([one])))


def random_text(grammar: str, rng: random.Random, marks: Sequence[str], most: int = 300) -> str | None:
    """A text that the grammar admits; None if it is not complete after so many tokens.

    In free text, one of `marks` follows now and then, which random tokens would hardly spell.
    """
    matcher: Any = compiler().matcher(StructuredOutputsParams(grammar=grammar), [EOS])
    ids: list[int] = []
    while len(ids) < most:
        allowed = np.frombuffer(matcher.compute_logit_bias(), np.uint8).nonzero()[0].tolist()
        if allowed == [EOS] or (EOS in allowed and rng.random() < 0.5):
            return tokenizer().decode(ids, skip_special_tokens=False)
        allowed = [one for one in allowed if one != EOS]
        new = [rng.choice(allowed)]
        if len(allowed) > MANY and rng.random() < 0.4:
            marked = tokenizer().encode(rng.choice(marks), add_special_tokens=False)
            new = marked if matcher.deep_copy().consume_tokens(marked) else new
        elif (closing := [one for one in allowed if one in closing_tokens()]) and rng.random() < 0.6:
            new = [rng.choice(closing)]
        ids += new
        assert matcher.consume_tokens(new), matcher.get_error()
    return None


def check_calls(events: list[Event], tools: Mapping[str, Mapping[str, Any]]) -> int:
    """Every part is a call of a known function, with arguments of the types of its schema; returns their number."""
    starts = [event for event in events if isinstance(event, CallStart)]
    assert starts and all(isinstance(event, CallStart | CallArguments | Thought) for event in events), events
    for start in starts:
        schema = tools[start.name]
        pieces = [event.text for event in events if isinstance(event, CallArguments) and event.index == start.index]
        arguments = json.loads("".join(pieces))
        assert set(schema.get("required", ())) <= arguments.keys()
        for key, one in schema.get("properties", {}).items():
            if key in arguments:
                check_value(arguments[key], one)
    return len(starts)


def check_value(value: object, schema: Mapping[str, Any]) -> None:
    if "enum" in schema:
        assert value in schema["enum"]
    kinds = {"string": str, "integer": int, "array": list, "object": dict}
    if schema.get("type") in kinds:
        assert isinstance(value, kinds[schema["type"]]), (value, schema)


@pytest.mark.parametrize("dialect", WITH_CALLS, ids=lambda dialect: dialect.name)
def test_admitted_texts_are_read_back(dialect: Dialect) -> None:
    assert dialect.calls is not None
    rng, num_complete = random.Random(dialect.name), 0
    marks = ['"', *([divided(dialect.calls.arguments.each)[2].strip()] if dialect.calls.arguments else [])]
    for constraint in (Constraint(TOOLS), Constraint({"get_weather": TOOLS["get_weather"]}, is_parallel=False)):
        grammar = call_grammar(dialect.calls, constraint)
        for _ in range(4):
            if (text := random_text(grammar, rng, marks)) is not None:
                found = check_calls(DialectParser.of(dialect, tools=constraint.tools).parse(text), constraint.tools)
                assert found == 1 or constraint.is_parallel
                num_complete += 1
    assert num_complete >= 3, "random texts of this grammar do not end"


@pytest.mark.parametrize("in_reasoning", [False, True])
def test_reasoning_may_precede_forced_calls(in_reasoning: bool) -> None:
    hermes, think = DIALECTS["hermes"], DIALECTS["think"]
    assert hermes.calls is not None
    constraint = Constraint(TOOLS, reasoning=think.reasoning, in_reasoning=in_reasoning)
    grammar, rng = call_grammar(hermes.calls, constraint), random.Random(1)
    thoughts = 0
    for _ in range(8):
        if (text := random_text(grammar, rng, ['"', "</think>"])) is not None:
            parser = DialectParser(hermes.calls, think.reasoning, tools=TOOLS, in_reasoning=in_reasoning)
            events = parser.parse(text)
            check_calls(events, TOOLS)
            thoughts += any(isinstance(event, Thought) for event in events)
    assert thoughts


def test_special_tokens_are_tokens_of_the_grammar() -> None:
    """A mark that ends the answer is left out: the engine takes it for the end."""
    harmony = DIALECTS["harmony"]
    assert harmony.calls is not None
    ids = {"<|channel|>": 11, "<|message|>": 12, "<|call|>": 13, "<|constrain|>": 14}
    grammar = call_grammar(harmony.calls, Constraint({"f": {}}, special_ids=ids, end_ids={13}, is_parallel=False))
    [call] = [line for line in grammar.splitlines() if line.startswith("call_0")]
    assert call == 'call_0: <[11]> "commentary to=functions." "f" " " <[14]> " json" <[12]> arguments_0'


@pytest.mark.parametrize(
    ("name", "schema", "message"),
    [
        (
            "qwen3_coder",
            {"x": {"type": "string", "pattern": "a+"}},
            "the keyword 'pattern' cannot be enforced in a t",
        ),
        ("pythonic", {"x": {"type": "integer", "minimum": 1}}, "the keyword 'minimum' cannot be enforced in a Python"),
    ],
)
def test_keywords_that_cannot_be_enforced_are_named(name: str, schema: dict[str, Any], message: str) -> None:
    calls = DIALECTS[name].calls
    assert calls is not None
    with pytest.raises(CannotConstrain, match=message):
        call_grammar(calls, Constraint({"f": {"properties": schema}}))
    assert DIALECTS["hermes"].calls is not None
    assert '"f"' in call_grammar(DIALECTS["hermes"].calls, Constraint({"f": {"properties": schema}}))
