"""The token ids of prompts, of which texts need a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from sageLLM.runtime.engine.embedding_requests import embedding_ids, prompt_text
from sageLLM.runtime.engine.prompts import ParsedPrompt
from sageLLM.runtime.errors import TokenizerError
from sageLLM.runtime.loader.sentence_transformers import EmbeddingRecipe
from sageLLM.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PromptIds:
    """Encodes prompts. A text without a tokenizer raises TokenizerError."""

    tokenizer: Tokenizer | None
    recipe: EmbeddingRecipe
    max_model_len: int

    def to_generate(self, prompt: ParsedPrompt) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        return self._required("a text prompt").encode(prompt.text or "")

    def to_embed(self, prompt: ParsedPrompt, prompt_name: str | None) -> list[int]:
        """The ids after those of the recipe's prompt `prompt_name`, cut to its length."""
        prompt_text(prompt_name, self.recipe)  # an unknown name is an error for token ids too
        if prompt.token_ids is not None:
            return prompt.token_ids
        tokenizer = self._required("a text prompt")
        return embedding_ids(prompt.text or "", prompt_name, self.recipe, tokenizer, self.max_model_len)

    def _required(self, use: str) -> Tokenizer:
        if self.tokenizer is None:
            raise no_tokenizer(use)
        return self.tokenizer


def no_tokenizer(use: str) -> TokenizerError:
    return TokenizerError(f"{use} requires the tokenizer; load the model without skip_tokenizer, or pass token ids")
