"""The tokenizer in the metadata of a GGUF file, as the files tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sageLLM.runtime.core.model.hf_config import shown
from sageLLM.runtime.errors import TokenizerError
from sageLLM.runtime.loader.gguf_reader import GgufHeader

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
"""The values of `tokenizer.ggml.token_type`."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: Mapping[str, str | None] = {
    "default": None, "gpt-2": None, "gpt2": None, "smollm": "digits",
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "qwen2": _QWEN2,
}  # fmt: skip
"""Patterns by which texts are split before merges, by `tokenizer.ggml.pre`; None is that of GPT-2."""
HUGGINGFACE = "tokenizer.huggingface.json"
"""The key with a whole tokenizer.json as text, for kinds that the other keys cannot describe."""
ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
          "pad_token": "padding_token_id"}  # fmt: skip


def tokenizer_of(header: GgufHeader) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and tokenizer_config.json.

    Raises TokenizerError for a kind of tokenizer that is not supported, and for inconsistent lists.
    """
    metadata = header.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(f"{header.path}: 'tokenizer.ggml.model' must be gpt2 or llama, got {shown(kind)}")
    tokens = _texts(header, "tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise TokenizerError(f"{header.path}: 'tokenizer.ggml.token_type' must have {len(tokens)} elements")
    special = {name: tokens[i] for name, i in _special(header, len(tokens))}
    makers = {"gpt2": _byte_level, "llama": _sentence_piece}
    content = makers[kind](header, tokens, types, special)
    ends = {
        "bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        "eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
    content["post_processor"] = _template(special, tokens, ends)
    content["added_tokens"] = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": types[i] != USER}
        for i, token in enumerate(tokens) if types[i] in (UNKNOWN, CONTROL, USER)
    ]  # fmt: skip
    return content, special | _chat_template(header)


def huggingface_tokenizer(header: GgufHeader) -> dict[str, Any]:
    """tokenizer.json and its settings of a file that has the first as text; empty if it has none."""
    text = header.metadata.get(HUGGINGFACE)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        tokens = {i: token for token, i in ids_of(content).items()}
        settings = {name: tokens[i] for name, i in _special(header, max(tokens, default=-1) + 1)}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{header.path}: '{HUGGINGFACE}' must be the text of a tokenizer.json") from None
    return {"tokenizer.json": content, "tokenizer_config.json": settings | _chat_template(header)}


def ids_of(content: Mapping[str, Any]) -> dict[str, int]:
    """The ids of all tokens of a tokenizer.json; pieces with scores are in a list."""
    vocabulary = content["model"]["vocab"]
    is_list = isinstance(vocabulary, list)
    ids = {token: i for i, (token, _) in enumerate(vocabulary)} if is_list else dict(vocabulary)
    return ids | {one["content"]: one["id"] for one in content.get("added_tokens") or ()}


def _chat_template(header: GgufHeader) -> dict[str, Any]:
    template = header.metadata.get("tokenizer.chat_template")
    return {"chat_template": template} if isinstance(template, str) else {}


def _special(header: GgufHeader, count: int) -> Iterator[tuple[str, int]]:
    for name, key in ROLES.items():
        found = header.metadata.get(f"tokenizer.ggml.{key}")
        if found is None:
            continue
        if type(found) is not int or not 0 <= found < count:
            raise TokenizerError(f"{header.path}: 'tokenizer.ggml.{key}' must be a token, got {shown(found)}")
        yield name, found


def _byte_level(
    header: GgufHeader, tokens: Sequence[str], types: Sequence[int], special: Mapping[str, str]
) -> dict[str, Any]:
    """Merges of bytes, as in GPT-2."""
    pre = header.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise TokenizerError(
            f"{header.path}: 'tokenizer.ggml.pre' must be one of {', '.join(SPLITS)}, got {shown(pre)}"
        )
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": SPLITS[pre] is None}
    steps: list[dict[str, Any]] = [bytes_]
    if SPLITS[pre] == "digits":
        steps = [{"type": "Digits", "individual_digits": True}, {**bytes_, "use_regex": True}]
    elif SPLITS[pre] is not None:
        split = {"type": "Split", "pattern": {"Regex": SPLITS[pre]}, "behavior": "Isolated", "invert": False}
        steps = [split, bytes_]
    return {
        "version": "1.0",
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**bytes_, "add_prefix_space": True, "use_regex": True},
        "model": _merges_model(tokens, _texts(header, "merges"), special.get("unk_token"))
        | {"ignore_merges": SPLITS[pre] == _LLAMA3},
    }


def _sentence_piece(
    header: GgufHeader, tokens: Sequence[str], types: Sequence[int], special: Mapping[str, str]
) -> dict[str, Any]:
    """Pieces with scores, of which the pair with the best merged piece is merged first."""
    scores = header.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"{header.path}: 'tokenizer.ggml.scores' must have {len(tokens)} numbers")
    pieces = {token: scores[i] for i, token in enumerate(tokens) if types[i] == NORMAL}
    prepends = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}] if prepends else []
    space = {"pattern": {"String": " "}, "content": "\u2581"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepends else []
    unknown = special.get("unk_token") or next((tokens[i] for i, one in enumerate(types) if one == UNKNOWN), None)
    return {
        "version": "1.0",
        "normalizer": {"type": "Sequence", "normalizers": [*normalizers, {"type": "Replace", **space}]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _merges_model(tokens, list(_merges(pieces)), unknown) | {"fuse_unk": True, "byte_fallback": True},
    }


def _merges(pieces: Mapping[str, float]) -> Iterator[str]:
    """Pairs of pieces, those with the best result first."""
    for piece in sorted(pieces, key=lambda piece: -pieces[piece]):
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                yield f"{piece[:cut]} {piece[cut:]}"


def _merges_model(tokens: Sequence[str], merges: Sequence[str], unknown: str | None) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": list(merges),
    }


def _template(special: Mapping[str, str], tokens: Sequence[str], ends: Mapping[str, bool]) -> dict[str, Any] | None:
    """The post-processor that adds the tokens of the roles in `ends` around a text, if the file has them."""
    names = {role: [special[role]] if adds and role in special else [] for role, adds in ends.items()}
    added = {*names["bos_token"], *names["eos_token"]}
    if not added:
        return None
    first, last = (
        [{"SpecialToken": {"id": one, "type_id": 0}} for one in names[role]] for role in ("bos_token", "eos_token")
    )
    text, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, *last, second, *last],
        "special_tokens": {one: {"id": one, "ids": [tokens.index(one)], "tokens": [one]} for one in sorted(added)},
    }


def _texts(header: GgufHeader, name: str) -> list[str]:
    found = header.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise TokenizerError(f"{header.path}: 'tokenizer.ggml.{name}' must be a list of texts, got {shown(found)}")
    return found
