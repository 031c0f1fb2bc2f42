"""The tokenizer of a checkpoint folder as the metadata of a GGUF file: the inverse of `loader/gguf_tokenizer.py`.

A tokenizer that llama.cpp's keys cannot describe is written as the text of tokenizer.json, which sageLLM reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sageLLM.runtime.errors import TokenizerError
from sageLLM.runtime.loader.gguf_folder import NO_VOCABULARY
from sageLLM.runtime.loader.gguf_reader import GgufHeader
from sageLLM.runtime.loader.gguf_tokenizer import (
    BYTE,
    CONTROL,
    HUGGINGFACE,
    NORMAL,
    ROLES,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER,
    ids_of,
    tokenizer_of,
)
from sageLLM.runtime.loader.json_files import read_json
from sageLLM.runtime.text.tokenizer import Tokenizer

FILE = "tokenizer.json"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_MODEL_SETTINGS = ("ignore_merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
_TOKEN_SETTINGS = ("lstrip", "rstrip", "single_word")


def vocabulary_of(folder: Path, num_rows: int) -> dict[str, Any]:
    """The keys of the tokenizer, and of no tokenizer if the folder has none.

    `num_rows` is the number of rows of the embedding, of which those without a token are unused.
    """
    if not (folder / FILE).is_file():
        return {"tokenizer.ggml.model": NO_VOCABULARY}
    content = read_json(folder / FILE)
    tokenizer = Tokenizer.from_folder(folder)
    if not isinstance(content, Mapping):
        raise TokenizerError(f"{folder / FILE} must hold a JSON object")
    shared = _special(content, tokenizer)
    if (template := tokenizer.chat_templates.get("default")) is not None:
        shared["tokenizer.chat_template"] = template
    for found in _candidates(content, num_rows):
        keys = {f"tokenizer.ggml.{key}": value for key, value in found.items()} | shared
        if _is_same(tokenizer_of(GgufHeader(folder / FILE, keys, {}))[0], content):
            return keys
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return {"tokenizer.ggml.model": NO_VOCABULARY, **shared, HUGGINGFACE: text}


def _special(content: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of special tokens, and whether texts begin and end with one."""
    ids = ids_of(content)
    found = {key: ids.get(tokenizer.special_tokens.get(role) or "") for role, key in ROLES.items()}
    ends = [i for i in (found["eos_token_id"], *sorted(tokenizer.eos_token_ids)) if i is not None]
    found |= dict(zip(_END_KEYS, dict.fromkeys(ends), strict=False))
    keys = {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}
    around = _ends(content)
    adds = {"add_bos_token": around[0] is not None, "add_eos_token": around[-1] is not None}
    return {**keys, **{f"tokenizer.ggml.{key}": value for key, value in adds.items()}}


def _candidates(content: Mapping[str, Any], num_rows: int) -> Iterator[dict[str, Any]]:
    """The keys after `tokenizer.ggml.` of each kind of tokenizer that this one may be."""
    model = content["model"]
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, Mapping):
        return
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    tokens, types = _tokens(content, vocabulary, num_rows)
    if model.get("byte_fallback"):
        ranks = {"".join(one.split(" ", 1)): -float(i) for i, one in reversed(list(enumerate(merges)))}
        scores = [ranks.get(token, -float(len(tokens))) for token in tokens]
        prepends = any(one.get("type") == "Prepend" for one in _steps(content.get("normalizer"), "normalizers"))
        yield {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "add_space_prefix": prepends}
        return
    for pre in SPLITS:
        if pre != "default":
            yield {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}


def _tokens(content: Mapping[str, Any], vocabulary: Mapping[str, int], num_rows: int) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types."""
    added = {one["id"]: one for one in _added(content)}
    unknown = content["model"].get("unk_token")
    texts = {i: token for token, i in vocabulary.items()} | {i: one["content"] for i, one in added.items()}
    count = max(num_rows, max(texts, default=-1) + 1)
    types = []
    for i in range(count):
        token = texts.get(i)
        is_byte = token is not None and len(token) == 6 and token.startswith("<0x")
        types.append(
            UNUSED if token is None
            else UNKNOWN if token == unknown
            else (CONTROL if added[i]["special"] else USER) if i in added
            else BYTE if is_byte and content["model"].get("byte_fallback")
            else NORMAL
        )  # fmt: skip
    return [texts.get(i, f"[PAD{i}]") for i in range(count)], types


def _added(content: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return content.get("added_tokens") or []


def _is_same(found: Mapping[str, Any], content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer made of the keys makes the tokens of texts that the checkpoint's makes."""
    return all(
        part(found) == part(content)
        for part in (_normalizers, _pre_tokenizers, _merges, _settings, _ends, _added_settings)
    )


def _normalizers(content: Mapping[str, Any]) -> object:
    return _steps(content.get("normalizer"), "normalizers")


def _pre_tokenizers(content: Mapping[str, Any]) -> object:
    return _steps(content.get("pre_tokenizer"), "pretokenizers")


def _settings(content: Mapping[str, Any]) -> object:
    return [content["model"].get(key) or None for key in _MODEL_SETTINGS]


def _added_settings(content: Mapping[str, Any]) -> object:
    """The settings of added tokens that are found with the spaces around them, as whole words alone, or after the
    normaliser, if there is one."""
    keys = (*_TOKEN_SETTINGS, "normalized") if _normalizers(content) else _TOKEN_SETTINGS
    settings = {one["id"]: [bool(one.get(key)) for key in keys] for one in _added(content)}
    return {i: one for i, one in settings.items() if any(one)}


def _ends(content: Mapping[str, Any]) -> list[object]:
    """The ids around a text, which itself is None."""
    ids: list[object] = [None]
    for processor in _steps(content.get("post_processor"), "processors"):
        if processor["type"] == "TemplateProcessing":
            around = [_piece_ids(piece, processor["special_tokens"]) for piece in processor["single"]]
            at = ids.index(None)
            ids[at : at + 1] = [i for piece in around for i in piece]
        elif processor["type"] != "ByteLevel":
            ids.append(processor)
    return ids


def _piece_ids(piece: Mapping[str, Any], special: Mapping[str, Any]) -> list[Any]:
    return [None] if "Sequence" in piece else list(special[piece["SpecialToken"]["id"]]["ids"])


def _steps(section: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or a single one, without settings of positions in the text."""
    if section is None:
        return []
    parts = section[key] if section["type"] == "Sequence" else [section]
    return [{name: value for name, value in one.items() if name != "trim_offsets"} for one in parts]


def _merges(content: Mapping[str, Any]) -> object:
    """The merges: in order, but for pieces with scores, whose merges to one piece have the same rank."""
    model = content["model"]
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return set(merges) if model.get("byte_fallback") else merges
