"""Small tokenizers of the two families, trained or built by the fixtures."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sageLLM.runtime.text import tokenizer as engine_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n\tprint('naïve café', i)",
    "你好，世界。 The quick brown fox jumps over the lazy dog.",
    "emoji 👩‍👩‍👧 and 🇩🇪 flags; Ωμέγα; \u00a0 spaces   twice",
]


def train_byte_level() -> Tokenizer:
    """Like Llama 3, Qwen and GPT-2: pieces are bytes, so a character may be split over tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return backend


def make_sentencepiece_like() -> Tokenizer:
    """Like Llama 2: pieces with a mark for the space, unknown characters as byte pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({char for text in TEXTS[:1] for char in text.replace(" ", "▁")} | set("▁etaoinshr,."))
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters, "▁a", "▁t", "th", "▁th"])}
    merges = [("▁", "a"), ("▁", "t"), ("t", "h"), ("▁t", "h")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(text, special=True) for text in pieces[:3]])
    return backend


def make_metaspace() -> Tokenizer:
    """Like T5 and Gemma's older files: the decoder, not a Strip step, drops the first token's space."""
    backend = make_sentencepiece_like()
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


def make_word_piece() -> Tokenizer:
    """Like BERT: the decoder writes a space before a token unless it continues a word."""
    pieces = ["[UNK]", "[CLS]", "[SEP]", "a", "the", "##s", "##e", "t", "##h", ".", ",", "n", "'"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens([AddedToken(text, special=True) for text in pieces[:3]])
    return backend


def wrap(backend: Tokenizer, eos_token: str) -> engine_tokenizer.Tokenizer:
    config = engine_tokenizer.TokenizerConfig({"eos_token": eos_token}, {}, frozenset())
    return engine_tokenizer.Tokenizer(backend, config)


@pytest.fixture(scope="session")
def byte_level() -> engine_tokenizer.Tokenizer:
    return wrap(train_byte_level(), "<|end|>")


@pytest.fixture(scope="session")
def sentencepiece_like() -> engine_tokenizer.Tokenizer:
    return wrap(make_sentencepiece_like(), "</s>")


@pytest.fixture(scope="session")
def metaspace() -> engine_tokenizer.Tokenizer:
    return wrap(make_metaspace(), "</s>")


@pytest.fixture(scope="session")
def word_piece() -> engine_tokenizer.Tokenizer:
    return wrap(make_word_piece(), "[SEP]")


@pytest.fixture(scope="session")
def families(byte_level, sentencepiece_like, metaspace, word_piece) -> dict[str, engine_tokenizer.Tokenizer]:
    return {
        "byte_level": byte_level,
        "sentencepiece_like": sentencepiece_like,
        "metaspace": metaspace,
        "word_piece": word_piece,
    }
