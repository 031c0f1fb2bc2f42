"""Pooling and token ids of texts to embed, by the settings of a sentence-transformers folder."""

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.core.model.layout import ModelLayout
from sageLLM.runtime.errors import PromptError, SageError
from sageLLM.runtime.execution_graph.embedding import Pooling, poolings_of
from sageLLM.runtime.loader.sentence_transformers import EmbeddingRecipe
from sageLLM.runtime.text.tokenizer import Tokenizer


def choose_pooling(requested: Pooling | None, layout: ModelLayout, recipe: EmbeddingRecipe) -> Pooling:
    """The requested pooling, or the default one; SageError if the layout does not support it."""
    supported = poolings_of(layout)
    if not supported:
        raise SageError(
            f"the layout '{layout.name}' does not name a value to embed with; "
            f"add `hidden: NAME` to {layout.spec} (docs/add-a-model.md)"
        )
    if requested is None and recipe.unsupported is not None:
        raise SageError(f"{recipe.unsupported}; choose one with pooling=: {', '.join(supported)}")
    default: Pooling = "model" if layout.pooled else "last" if layout.generates else "mean"
    chosen = requested or recipe.pooling or default
    if chosen not in supported:
        raise SageError(f"pooling must be one of {', '.join(supported)} for {layout.name}, got {shown(chosen)}")
    return chosen


def embedding_ids(
    text: str, prompt_name: str | None, recipe: EmbeddingRecipe, tokenizer: Tokenizer, max_model_len: int
) -> list[int]:
    """The token ids of a text after the prompt of that name, cut to the recipe's length if it truncates."""
    text = (prompt_text(prompt_name, recipe) + text).strip() if recipe.truncates else text
    text = text.lower() if recipe.lower_case else text
    ids = tokenizer.encode(text, truncates=recipe.truncates)
    limit = min(recipe.max_seq_length or max_model_len, max_model_len)
    if not recipe.truncates or len(ids) <= limit:
        return ids
    return _cut(ids, tokenizer.encode(text, add_special_tokens=False, truncates=True), limit)


def prompt_text(name: str | None, recipe: EmbeddingRecipe) -> str:
    """The prompt of a name; the folder's default for None, and none for the empty name."""
    name = recipe.default_prompt if name is None else name
    if not name:
        return ""
    if name not in recipe.prompts:
        known = ", ".join(map(shown, recipe.prompts)) or "it has none"
        raise PromptError(
            f"prompt_name must be one of the folder's prompts ({known}), got {shown(name)}", "prompt_name"
        )
    if recipe.prompts[name] and not recipe.includes_prompt:
        raise PromptError(
            f"the prompt {shown(name)} cannot be used, as the folder's pooling excludes its tokens, which is not "
            "supported; pass prompt_name='' to embed texts without it",
            "prompt_name",
        )
    return recipe.prompts[name]


def _cut(ids: list[int], content: list[int], limit: int) -> list[int]:
    """The first `limit` ids, of which the special tokens around the content are kept, as tokenizers truncate."""
    start = next((i for i in range(len(ids) - len(content) + 1) if ids[i : i + len(content)] == content), None)
    if start is None:  # special tokens inside the content
        return ids[:limit]
    before, after = ids[:start], ids[start + len(content) :]
    return [*before, *content[: max(0, limit - len(before) - len(after))], *after]
