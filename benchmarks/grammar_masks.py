"""Measures the token masks of structured output with a synthetic vocabulary of 128,000 tokens.

    python benchmarks/grammar_masks.py [--answers 100] [--vocabulary 128000]

Prints the time to prepare the vocabulary and to compile each grammar, and per token the time of the mask with the
consumption of the token before it, in one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.grammar.constraint import GrammarConstraint
from sageLLM.runtime.grammar.masks import MaskFiller
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams

FILLER = MaskFiller()
END = "<|end|>"
LETTERS = 'etaoinshrdlucmfwypvbgkjqxzETAOIN0123456789_-."{}[]:,/ '
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "JSON schema, 6 fields": {"json": PERSON},
    "any JSON object": {"json_object": True},
    "regex of a date": {"regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}"},
    "choice of 20": {"choice": [f"choice number {i}" for i in range(20)]},
    "Lark grammar": {"grammar": 'start: sum\nsum: NUM ("+" NUM)*\nNUM: /[0-9]+/ | "(" /[a-z]+/ ")"'},
}


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """A byte-level tokenizer of random pieces of 1 to 9 letters, with the frequencies of English."""
    rng = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    weights = [max(1, 60 - i) for i in range(len(LETTERS))]
    while len(vocabulary) < num_tokens:
        piece = "".join(rng.choices(LETTERS, weights, k=rng.randint(2, 9))).replace(" ", "Ġ")
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def mask_seconds(compiler: GrammarCompiler, params: StructuredOutputsParams, eos: int, seed: int) -> Iterator[float]:
    """The seconds of each mask of one random answer."""
    rng, ids = np.random.default_rng(seed), list[int]()
    constraint = GrammarConstraint(compiler, params, [eos], ids)
    while len(ids) < 200:
        start = time.perf_counter()
        FILLER.fill([constraint])
        yield time.perf_counter() - start
        ids.append(int(rng.choice(np.flatnonzero(constraint.bias().numpy() == 0.0))))
        if ids[-1] == eos:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, eos = Path(name), options.vocabulary
        write_tokenizer(folder, options.vocabulary)
        compiler = GrammarCompiler(folder, options.vocabulary + 256)
        start = time.perf_counter()
        compiler.check(StructuredOutputsParams(regex="a"), [eos])
        print(f"vocabulary of {options.vocabulary} tokens: {time.perf_counter() - start:.2f} s")
        for title, fields in GRAMMARS.items():
            params = StructuredOutputsParams(**fields)
            start = time.perf_counter()
            compiler.check(params, [eos])
            compiled = 1e3 * (time.perf_counter() - start)
            seconds = [one for seed in range(options.answers) for one in mask_seconds(compiler, params, eos, seed)]
            p50, p99 = 1e6 * np.percentile(seconds, [50, 99])
            print(
                f"{title:22} compiled in {compiled:4.1f} ms, {len(seconds):6} masks: {p50:.0f} us p50, {p99:.0f} us p99"
            )


if __name__ == "__main__":
    main()
