"""Random JSON schemas, and random texts that their grammars admit.

    python tests/grammar/random_schemas.py --seeds 0:10000

checks that every text of a grammar validates against its schema, and that every refusal names a keyword of the schema.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import random
import sys
import time
import uuid
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator, FormatChecker

from sageLLM.runtime.errors import SamplingParamsError
from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.grammar.constraint import GrammarConstraint
from sageLLM.runtime.grammar.masks import MaskFiller
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams
from sageLLM.runtime.text.tokenizer import Tokenizer

MODEL = Path(__file__).parents[2] / "examples/tiny_python_model"
MAX_TOKENS = 300
MAX_DEPTH = 3
PATTERNS = ("^[a-z]{1,4}$", "^[0-9]+$", "^(red|green)$", "[A-F]", "^a.*z$", "^\\d{2}-\\d{2}$", "(?=x)y")
FORMATS = ("date", "uuid", "ipv4", "ipv6", "no-such-format")
REFUSED = {
    "uniqueItems": True,
    "contains": {"type": "integer"},
    "not": {"type": "string"},
    "dependentRequired": {"a": ["b"]},
    "propertyNames": {"pattern": "^a"},
    "unevaluatedProperties": False,
    "if": {"type": "string"},
    "nullable": True,
    "maxLenght": 3,
    "x-guidance": {"lenient": True},
}

formats = FormatChecker(formats=())
for name, parse in (
    ("date", date.fromisoformat),
    ("uuid", uuid.UUID),
    ("ipv4", ipaddress.IPv4Address),
    ("ipv6", ipaddress.IPv6Address),
):
    formats.checks(name, ValueError)(lambda value, parse=parse: not isinstance(value, str) or bool(str(parse(value))))


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    """A schema with any of the keywords, some of which are refused."""
    kinds = ["string", "integer", "number", "boolean", "null", "const", "enum", "ref", "types", "any"]
    if depth < MAX_DEPTH:
        kinds += ["object"] * 5 + ["array"] * 3 + ["anyOf", "oneOf", "allOf"]
    schema: Any = MAKERS[rng.choice(kinds)](rng, depth)
    if rng.random() < 0.15:
        schema["description"] = "a note"
    if rng.random() < 0.02:
        name = rng.choice(list(REFUSED))
        schema[name] = REFUSED[name]
    if depth == 0:
        schema["$defs"] = {"leaf": random_leaf(rng), "node": random_node(rng)}
    return schema


def random_leaf(rng: random.Random) -> Any:
    return MAKERS[rng.choice(["string", "integer", "boolean", "enum"])](rng, MAX_DEPTH)


def random_node(rng: random.Random) -> Any:
    """A recursive schema."""
    children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": rng.randint(0, 2)}
    properties = {"value": {"$ref": "#/$defs/leaf"}, "children": children}
    return {"type": "object", "properties": properties, "required": ["value"], "additionalProperties": False}


def bounds(rng: random.Random, low: str, high: str, most: int) -> dict[str, Any]:
    """Some bounds; rarely contradicting ones."""
    first, second = sorted(rng.sample(range(most + 1), 2), reverse=rng.random() < 0.02)
    found = {}
    if rng.random() < 0.5:
        found[low] = first
    if rng.random() < 0.7:
        found[high] = second
    return found


def string(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    choice = rng.random()
    if choice < 0.5:
        schema |= bounds(rng, "minLength", "maxLength", 12)
    elif choice < 0.8:
        schema["pattern"] = rng.choice(PATTERNS)
    elif choice < 0.95:
        schema["format"] = rng.choice(FORMATS)
    return schema


def integer(rng: random.Random, depth: int) -> Any:
    schema = {"type": "integer", **bounds(rng, "minimum", "maximum", 2000)}
    if rng.random() < 0.2:
        schema["multipleOf"] = rng.choice([2, 5, 7])
    return schema


def number(rng: random.Random, depth: int) -> Any:
    schema = {"type": "number", **bounds(rng, "exclusiveMinimum", "exclusiveMaximum", 100)}
    if rng.random() < 0.1:
        schema["multipleOf"] = rng.choice([0.5, 0.25])
    return schema


def array(rng: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "array", **bounds(rng, "minItems", "maxItems", 4)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 2))]
    schema["items"] = False if rng.random() < 0.05 and "minItems" not in schema else random_schema(rng, depth + 1)
    return schema


def an_object(rng: random.Random, depth: int) -> Any:
    names = rng.sample(["name", "age", "tags", "a", "b", "long name", 'quo"te', "ключ"], rng.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    choice = rng.random()
    if choice < 0.6:
        schema["additionalProperties"] = False
    elif choice < 0.8:
        schema["additionalProperties"] = random_schema(rng, MAX_DEPTH)
    if rng.random() < 0.1:
        schema["patternProperties"] = {"^p_[a-z]{1,3}$": {"type": "integer"}}
    if rng.random() < 0.1:
        schema |= bounds(rng, "minProperties", "maxProperties", 4)
    return schema


def of_type(rng: random.Random, depth: int, kind: str) -> Any:
    return MAKERS[kind](rng, depth + 1)


MAKERS: dict[str, Any] = {
    "string": string,
    "integer": integer,
    "number": number,
    "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
    "const": lambda rng, depth: {"const": rng.choice([1, "x", None, True, [1, 2], {"a": "b"}])},
    "enum": lambda rng, depth: {"enum": rng.sample(["red", "green", 3, None, False, 2.5], rng.randint(1, 4))},
    "ref": lambda rng, depth: {"$ref": rng.choice(["#/$defs/leaf", "#/$defs/node"])},
    "types": lambda rng, depth: {"type": rng.sample(["string", "null", "integer"], 2), "maxLength": 5},
    "any": lambda rng, depth: {},
    "object": an_object,
    "array": array,
    "anyOf": lambda rng, depth: {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]},
    "oneOf": lambda rng, depth: {
        "oneOf": [of_type(rng, depth, kind) for kind in rng.sample(["string", "null", "array", "object", "integer"], 2)]
    },
    "allOf": lambda rng, depth: {"allOf": [integer(rng, depth), {"minimum": rng.randint(0, 50)}]},
}


def keywords(schema: object) -> set[str]:
    """All keys in the schema."""
    if isinstance(schema, dict):
        return set(schema) | {name for value in schema.values() for name in keywords(value)}
    return {name for value in schema for name in keywords(value)} if isinstance(schema, list) else set()


class Walker:
    """Draws random texts of grammars."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_folder(MODEL)
        self.eos_ids = sorted(self.tokenizer.eos_token_ids)
        self.compiler = GrammarCompiler(MODEL, self.tokenizer.vocab_size, self.tokenizer)
        self.filler = MaskFiller()

    def text(self, params: StructuredOutputsParams, rng: np.random.Generator, most: int = MAX_TOKENS) -> str | None:
        """The text up to the end-of-sequence token; None if it was not drawn. Raises SamplingParamsError."""
        self.compiler.check(params, self.eos_ids)
        ids: list[int] = []
        constraint = GrammarConstraint(self.compiler, params, self.eos_ids, ids)
        while len(ids) < most:
            self.filler.fill([constraint])
            allowed = np.flatnonzero(constraint.bias().numpy() == 0.0)
            ends = [token for token in self.eos_ids if token in allowed]
            # Low ids are single characters, which end strings and numbers sooner.
            weights = 1.0 / (1.0 + np.arange(len(allowed)))
            ids.append(ends[0] if ends and rng.random() < 0.5 else int(rng.choice(allowed, p=weights / weights.sum())))
            if ids[-1] in self.eos_ids:
                return self.tokenizer.decode(ids)
        return None


def check(walker: Walker, seed: int) -> str:
    """`valid`, `cut` or `refused`. AssertionError for a text that does not validate, or a refusal without a keyword."""
    schema = random_schema(random.Random(seed))
    params = StructuredOutputsParams(json=schema, disable_any_whitespace=seed % 4 != 0)
    try:
        text = walker.text(params, np.random.default_rng(seed))
    except SamplingParamsError as error:
        named = [name for name in keywords(schema) if name in str(error)]
        assert named or "nsatisfiable" in str(error), f"seed {seed}: {error}\n{json.dumps(schema)}"
        return "refused"
    if text is None:
        return "cut"
    errors = list(Draft202012Validator(schema, format_checker=formats).iter_errors(json.loads(text)))
    assert not errors, f"seed {seed}: {errors[0].message}\n{text}\n{json.dumps(schema)}"
    return "valid"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0:10000")
    first, last = (int(one) for one in parser.parse_args(arguments).seeds.split(":"))
    walker, start = Walker(), time.monotonic()
    counts = Counter(check(walker, seed) for seed in range(first, last))
    print(f"{last - first} schemas in {time.monotonic() - start:.0f} s: {dict(counts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
