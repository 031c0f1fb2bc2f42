"""Converts text to token ids and back, with the tokenizer files of a Hugging Face checkpoint folder.

Only JSON and plain text files are read, never Python code or pickles of the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from sageLLM.runtime.errors import TokenizerError
from sageLLM.runtime.files import read_regular_file
from sageLLM.runtime.text.added_tokens import add_missing_tokens, special_tokens
from sageLLM.runtime.text.detokenizer import REPLACEMENT
from sageLLM.runtime.text.token_text import TokenText
from sageLLM.runtime.text.tokenizer_probe import TokenizerProbe, caller_error, library_errors

MAX_CONFIG_BYTES = 16 * 2**20
MAX_TEXT_LEN = 8 * 2**20
"""The longest text, in characters, that `encode` accepts, if the model and the tokenizer do not set a lower limit."""
MIN_TOKEN_LEN = 64
"""Normalizers drop characters, such as repeated spaces, so a token may stand for more than the longest token has."""


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """Settings from the files next to tokenizer.json.

    `special_tokens` maps names such as "bos_token" to text; `chat_templates` maps names to Jinja sources, the usual
    name being "default".
    """

    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    eos_token_ids: frozenset[int]


class Tokenizer:
    """A tokenizer.json with its special tokens; `encode` and `decode` are those of the `tokenizers` library.

    The file's post-processor decides whether `encode` adds a begin-of-sequence token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        # A checkpoint may configure truncation or padding, which are for training. A prompt must not be cut silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = config.special_tokens
        self.chat_templates = config.chat_templates
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.byte_ids = _byte_ids(backend)
        self.eos_token_ids = config.eos_token_ids | self._ids_of(["eos_token"])
        self.bos_token_id = next(iter(self._ids_of(["bos_token"])), None)
        self.max_text_len = MAX_TEXT_LEN
        self.max_truncated_len = MAX_TEXT_LEN
        self._token_text = TokenText(self, _anchor(backend))
        # This decoder joins the bytes of the tokens, whatever they are; others look at the tokens to the left.
        self._joins_bytes = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        self._whole_texts: dict[int, str] = {}

    @classmethod
    def from_folder(
        cls, folder: str | Path, probe: TokenizerProbe | None = None, max_tokens: int | None = None
    ) -> Tokenizer:
        """Reads tokenizer.json and, if present, tokenizer_config.json, special_tokens_map.json, added_tokens.json,
        chat_template.jinja, generation_config.json and config.json.

        `probe` is one that `start_probe` has started for this folder. A text that cannot have as few as `max_tokens`
        tokens is refused before it is tokenised. Raises TokenizerError for a missing or damaged file, and for a
        tokenizer that crashes or exceeds the limits of the probe.
        """
        root = Path(folder)
        probe = probe or start_probe(root)
        bounds = probe.result()
        with library_errors(f"{probe.path} is not a tokenizer"):
            backend = tokenizers.Tokenizer.from_buffer(probe.data)
        config, special_map = _read_object(root / "tokenizer_config.json"), _read_special_map(root)
        added = _read_object(root / "added_tokens.json")
        add_missing_tokens(backend, config, special_map, added, root / "tokenizer_config.json")
        tokenizer = cls(backend, read_tokenizer_config(root))
        tokenizer.max_text_len = tokenizer.max_truncated_len = min(MAX_TEXT_LEN, bounds.max_text_len)
        if max_tokens is not None:
            longest = max_tokens * max(bounds.longest_token, MIN_TOKEN_LEN)
            tokenizer.max_text_len = min(tokenizer.max_text_len, longest)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included. The model's vocabulary may be larger (padded)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """The content of a tokenizer.json with all added tokens."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True, *, truncates: bool = False) -> list[int]:
        """The token ids of the text. Use add_special_tokens=False for a rendered chat template, which has its own.

        `truncates` is for a caller that cuts the ids: the text may then have more tokens than the model's longest
        sequence, and only the time of tokenising it is limited.
        """
        if len(text) > (limit := self.max_truncated_len if truncates else self.max_text_len):
            raise TokenizerError(f"the text must have at most {limit} characters, got {len(text)}")
        try:
            with library_errors("the text cannot be tokenised"):
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeEncodeError):  # the library's two ways to refuse what UTF-8 cannot express
            raise TokenizerError(_not_utf8(text)) from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids; ids beyond the vocabulary are skipped. Invalid UTF-8 becomes U+FFFD."""
        try:
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:  # not library_errors, as this runs in every step
            raise caller_error(error, "the tokens cannot be decoded") from None

    def whole_text(self, token_id: int) -> str:
        """The text of a token that is the same after any complete character; "" if that is not certain."""
        text = self._whole_texts.get(token_id)
        if text is None:
            text = self.decode([token_id], skip_special_tokens=False) if self._joins_bytes else ""
            text = self._whole_texts[token_id] = "" if REPLACEMENT in text else text
        return text

    def token_text(self, token_id: int, before: Sequence[int] = ()) -> str:
        """The text of one token after the tokens `before`, as in logprobs; see `TokenText`."""
        return self._token_text(token_id, before)

    def _ids_of(self, names: Iterable[str]) -> frozenset[int]:
        texts = (self.special_tokens[name] for name in names if name in self.special_tokens)
        ids = (self._backend.token_to_id(text) for text in texts)
        return frozenset(token_id for token_id in ids if token_id is not None)


def _byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """The ids of the pieces <0x00> to <0xFF>, if the decoder turns them into bytes."""
    letter = backend.token_to_id("<0x41>")
    if letter is None or backend.decode([letter]) != "A":
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)


def _anchor(backend: tokenizers.Tokenizer) -> list[int]:
    try:
        return list(backend.encode("a", add_special_tokens=False).ids)
    except Exception:  # a vocabulary without "a" and without an unknown token
        return []


def start_probe(folder: Path) -> TokenizerProbe:
    """Starts the probe of a folder's tokenizer.json; `Tokenizer.from_folder` takes it."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise TokenizerError(_missing(folder))
    return TokenizerProbe(path)


def _not_utf8(text: str) -> str:
    start = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return f"the text must be valid Unicode, got half of a surrogate pair ({text[start]!r}) at character {start}"


def read_tokenizer_config(root: Path) -> TokenizerConfig:
    config = _read_object(root / "tokenizer_config.json")
    return TokenizerConfig(
        special_tokens=special_tokens(config, _read_special_map(root)),
        chat_templates=_chat_templates(root, config),
        eos_token_ids=read_eos_ids(root),
    )


def read_eos_ids(root: Path) -> frozenset[int]:
    """The end-of-sequence ids of generation_config.json, else of config.json, which need no tokenizer."""
    generation, config = _read_object(root / "generation_config.json"), _read_object(root / "config.json")
    return _eos_ids(generation) or _eos_ids(config) or _eos_ids(config.get("text_config"))


def _read_special_map(root: Path) -> dict[str, object]:
    return _read_object(root / "special_tokens_map.json")


def _missing(root: Path) -> str:
    if not root.is_dir():
        return f"{root} is not a folder"
    if (root / "tokenizer.model").is_file():
        return (
            f"expected tokenizer.json in {root}, got tokenizer.model; convert it once with "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"expected tokenizer.json in {root}; copy it from the model's page, or pass prompts as token ids"


def _chat_templates(root: Path, config: Mapping[str, object]) -> dict[str, str]:
    templates = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        entries = (entry for entry in value if isinstance(entry, dict))
        pairs = ((entry.get("name"), entry.get("template")) for entry in entries)
        templates = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    path = root / "chat_template.jinja"
    if path.exists():
        templates["default"] = _read_text(path)
    return templates


def _eos_ids(config: object) -> frozenset[int]:
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0)


def _read_object(path: Path) -> dict[str, object]:
    """The JSON object in the file; {} if the file does not exist."""
    if not path.exists():
        return {}
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _read_bytes(path: Path, limit: int) -> bytes:
    return read_regular_file(path, limit, TokenizerError)
