"""Finds the tokens that only the files next to tokenizer.json name, and adds them as transformers does.

Older and hand-edited checkpoints list special tokens in tokenizer_config.json, special_tokens_map.json or
added_tokens.json without an entry in tokenizer.json. Without them the tokenizer would cut such a token into pieces, and
an end-of-sequence token among them would never stop an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from sageLLM.runtime.errors import TokenizerError

Values = Mapping[str, object]

STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ADDED_TOKENS = 2**16
"""Tokens that the library adds in about a second; checkpoints have hundreds."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def special_tokens(config: Values, special_map: Values) -> dict[str, str]:
    """Special tokens by name, such as "bos_token": those of the map, replaced and extended by those of the config.

    Names are the standard ones, other names that end in "_token", and those in an object under extra_special_tokens.
    """
    tokens: dict[str, str] = {}
    for values in (special_map, config):
        named = {name: value for name, value in values.items() if name.endswith("_token")}
        extra = values.get("extra_special_tokens")
        for name, value in (named | (extra if isinstance(extra, dict) else {})).items():
            text = _content(value)
            if text is not None:
                tokens[name] = text
    # The order in which transformers numbers tokens that it has to add.
    order = [name for name in STANDARD_NAMES if name in tokens]
    return {name: tokens[name] for name in [*order, *(name for name in tokens if name not in order)]}


def add_missing_tokens(
    backend: tokenizers.Tokenizer, config: Values, special_map: Values, added: Values, config_path: Path
) -> None:
    """Adds the named tokens that the backend does not know; a new token gets the next free id.

    `added` is added_tokens.json, from text to id. It and the map are used only if the config has no
    added_tokens_decoder, which replaced them.
    """
    known = list(backend.get_added_tokens_decoder().values())
    known_texts = {token.content for token in known}
    decoder = config.get("added_tokens_decoder")
    map_in_use = {} if isinstance(decoder, dict) else special_map
    special = [*special_tokens(config, map_in_use).values(), *_unnamed(config), *_unnamed(map_in_use)]
    if isinstance(decoder, dict):
        # A token that the backend knows with other flags, such as lstrip, takes those of the config.
        known_tokens = set(map(repr, known))
        listed = [token for token in _listed(decoder, special, config_path) if repr(token) not in known_tokens]
    else:
        by_id = sorted((i, text) for text, i in added.items() if isinstance(i, int) and _content(text))
        listed = [_token(text, special=text in special) for _, text in by_id if text not in known_texts]
    known_texts.update(token.content for token in listed)
    named = [_token(text, special=True) for text in dict.fromkeys(special) if text not in known_texts]
    if len(listed) + len(named) > MAX_ADDED_TOKENS:
        raise TokenizerError(
            f"{config_path.parent} must name at most {MAX_ADDED_TOKENS} tokens that tokenizer.json lacks, "
            f"got {len(listed) + len(named)}"
        )
    backend.add_tokens([*listed, *named])


def _listed(decoder: Values, special: list[str], config_path: Path) -> list[tokenizers.AddedToken]:
    """The tokens of added_tokens_decoder, an object from id to token, by ascending id."""
    tokens = []
    for key, value in decoder.items():
        text = _content(value)
        if not key.isdecimal() or len(key) > 10 or text is None or not isinstance(value, dict):
            raise TokenizerError(
                f"{config_path}: added_tokens_decoder must map token ids to objects with a content, got {key[:20]!r}"
            )
        flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
        if text in special:
            flags["special"] = True
        tokens.append((int(key), tokenizers.AddedToken(text, **flags)))
    return [token for _, token in sorted(tokens, key=lambda item: item[0])]


def _unnamed(values: Values) -> list[str]:
    """The unnamed special tokens, in a list under either of two keys."""
    listed = values.get("extra_special_tokens") or values.get("additional_special_tokens")
    contents: Iterable[str | None] = map(_content, listed) if isinstance(listed, list) else ()
    return [text for text in contents if text is not None]


def _token(text: str, *, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, special=special, normalized=not special)


def _content(value: object) -> str | None:
    """The text of a token, which is a string or an object; None for anything else.

    A text that is empty or has half of a surrogate pair cannot occur in a prompt, so it is None as well.
    """
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text or any("\ud800" <= char <= "\udfff" for char in text):
        return None
    return text
