"""Compiles grammars for the vocabulary of a checkpoint. Each is compiled once, and copied for every sequence."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sageLLM.runtime.errors import SageError, SamplingParamsError
from sageLLM.runtime.grammar.grammars import grammar_text
from sageLLM.runtime.grammar.matcher import Matcher
from sageLLM.runtime.sampling.structured_outputs import FIELD, StructuredOutputsParams
from sageLLM.runtime.text.tokenizer import Tokenizer

MAX_COMPILED = 256
MAX_REASON_LEN = 500


class TokenizerText(NamedTuple):
    """The content of a tokenizer.json, and its number of tokens."""

    json: str
    num_tokens: int


class GrammarCompiler:
    """The compiled grammars of one model. Its methods can be called in any thread.

    The vocabulary is prepared by `prepare` or with the first grammar, which takes seconds for 128k tokens.
    """

    def __init__(self, folder: Path, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` is that of the folder; without it the first grammar reads it."""
        self.vocab_size = vocab_size
        self._folder, self._tokenizer = folder, tokenizer
        self._text: TokenizerText | None = None
        self._vocabularies: dict[tuple[int, ...], Any] = {}
        self._compiled: OrderedDict[tuple[StructuredOutputsParams, tuple[int, ...]], Any] = OrderedDict()
        self._lock = threading.Lock()
        self.num_mask_tokens = vocab_size

    def matcher(self, params: StructuredOutputsParams, eos_ids: Iterable[int]) -> Matcher:
        """A matcher at the beginning of an answer, which `eos_ids` can end where the grammar accepts.

        Raises SamplingParamsError for a grammar that is invalid or not supported, TokenizerError for a checkpoint
        without a tokenizer that can be read.
        """
        key = params, tuple(sorted(eos_ids))
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
        if found is None:
            found = self._compile(params, key[1])
            with self._lock:
                self._compiled[key] = found
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        copy: Matcher = found.deep_copy()
        return copy

    def prepare(self, eos_ids: Iterable[int], tokenizer: TokenizerText | None = None) -> None:
        """Prepares the vocabulary, by the tokenizer or by that of the folder; nothing if llguidance cannot."""
        self._text = tokenizer or self._text
        with suppress(ImportError, SageError):
            self._vocabulary(tuple(sorted(eos_ids)))

    def check(self, params: StructuredOutputsParams, eos_ids: Iterable[int]) -> None:
        """Compiles the grammar. Raises what `matcher` raises."""
        self.matcher(params, eos_ids)

    def _compile(self, params: StructuredOutputsParams, eos_ids: tuple[int, ...]) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise SamplingParamsError(
                f"{FIELD} requires llguidance; run pip install 'sagellm[structured]'", FIELD
            ) from None
        if not eos_ids:
            raise SamplingParamsError(f"{FIELD} requires a checkpoint with an end-of-sequence token", FIELD)
        text = grammar_text(params)
        matcher = LLMatcher(self._vocabulary(eos_ids), text, log_level=0)
        problems = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
        if not problems and _is_empty(matcher):
            problems = ["no text of the model's tokens has this form"]
        if problems:
            raise SamplingParamsError(f"{FIELD}.{params.kind}: {_reason(problems[0])}", FIELD)
        return matcher

    def _vocabulary(self, eos_ids: tuple[int, ...]) -> Any:
        from llguidance import LLTokenizer

        with self._lock:
            if eos_ids not in self._vocabularies:
                tokenizer = self._text = self._text or self._read()
                # A tokenizer may have more tokens than the model, and the other way round.
                self.num_mask_tokens = max(self.vocab_size, tokenizer.num_tokens)
                try:
                    vocabulary = LLTokenizer(tokenizer.json, self.num_mask_tokens, list(eos_ids))
                except Exception as error:
                    raise SamplingParamsError(
                        f"{FIELD} requires a tokenizer that llguidance can read: {error}", FIELD
                    ) from None
                self._vocabularies[eos_ids] = vocabulary
            return self._vocabularies[eos_ids]

    def _read(self) -> TokenizerText:
        tokenizer = self._tokenizer or Tokenizer.from_folder(self._folder)
        return TokenizerText(tokenizer.to_json(), tokenizer.vocab_size)


def _is_empty(matcher: Any) -> bool:
    """Whether the grammar has no first token and no end, as of a schema that only refers to itself."""
    first = matcher.deep_copy()
    first.compute_logit_bias()
    return bool(first.is_error())


def _reason(error: str) -> str:
    """llguidance's message in one line. Its errors of patterns do not name the keyword."""
    line = " ".join(error.split())[:MAX_REASON_LEN]
    return f"in a pattern: {line}" if line.startswith("regex parse error") else line
