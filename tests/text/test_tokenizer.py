"""The tokenizer of a checkpoint folder: the files that it reads, and the exact message of each error."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend

from sageLLM.runtime.errors import TokenizerError
from sageLLM.runtime.text import tokenizer as module
from sageLLM.runtime.text.tokenizer import Tokenizer

TEXT = "def add(a, b):\n    return 'naïve 你好 👩‍👩‍👧'"


@pytest.fixture
def folder(tmp_path, byte_level):
    byte_level._backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_encode_and_decode_are_those_of_the_library(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode(TEXT) == backend.encode(TEXT).ids
    assert tokenizer.encode(TEXT)[0] == backend.token_to_id("<|begin|>")
    assert tokenizer.encode(TEXT, add_special_tokens=False) == backend.encode(TEXT).ids[1:]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT), skip_special_tokens=False) == "<|begin|>" + TEXT
    assert tokenizer.vocab_size == backend.get_vocab_size()


def test_ids_beyond_the_vocabulary_have_no_text(folder):
    assert Tokenizer.from_folder(folder).decode([10**6]) == ""


def test_truncation_and_padding_of_the_file_are_not_used(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_special_tokens_come_from_both_files_the_config_first(folder):
    write(folder / "special_tokens_map.json", {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|begin|>"})
    write(folder / "tokenizer_config.json", {"eos_token": {"content": "<|end|>", "lstrip": False}, "pad_token": None})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, {1})


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {1, 7, 8}),
        ({"eos_token_id": 7}, None, {1, 7}),
        ({}, {"eos_token_id": 9}, {1, 9}),
        (None, {"eos_token_id": None}, {1}),
        ({"eos_token_id": [True, "x", -1, 4]}, None, {1, 4}),
    ],
)
def test_eos_ids_join_the_token_and_the_generation_config(folder, generation, config, expected):
    write(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            write(folder / name, content)
    assert Tokenizer.from_folder(folder).eos_token_ids == expected


def test_chat_templates_are_found_in_each_of_their_places(folder):
    assert Tokenizer.from_folder(folder).chat_templates == {}
    write(folder / "tokenizer_config.json", {"chat_template": "A"})
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "A"}
    named = [{"name": "default", "template": "B"}, {"name": "tool_use", "template": "C"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "B", "tool_use": "C"}
    write(folder / "chat_template.jinja", "D")
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "D", "tool_use": "C"}


def refusal(folder) -> str:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder)
    return str(caught.value).replace(str(folder), "F")


def test_missing_tokenizer(tmp_path):
    assert refusal(tmp_path) == (
        "expected tokenizer.json in F; copy it from the model's page, or pass prompts as token ids"
    )
    (tmp_path / "tokenizer.model").write_bytes(b"\0")
    assert refusal(tmp_path) == (
        "expected tokenizer.json in F, got tokenizer.model; convert it once with "
        "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )
    assert refusal(tmp_path / "none") == "F is not a folder"


def test_damaged_files(folder):
    write(folder / "tokenizer_config.json", "[1]")
    assert refusal(folder) == "F/tokenizer_config.json must hold a JSON object, got a list"
    write(folder / "tokenizer_config.json", "{")
    assert refusal(folder).startswith("F/tokenizer_config.json is not JSON: Expecting property name")
    write(folder / "tokenizer_config.json", "[" * 100_000)
    assert refusal(folder).startswith("F/tokenizer_config.json is not JSON: maximum recursion depth exceeded")
    (folder / "tokenizer_config.json").write_bytes(b"\xff")
    assert refusal(folder) == "F/tokenizer_config.json is not UTF-8: invalid start byte at byte 0"
    write(folder / "tokenizer.json", '{"model": 3}')
    assert refusal(folder).startswith("F/tokenizer.json is not a tokenizer: ")


def test_too_large_a_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONFIG_BYTES", 3)
    write(folder / "tokenizer_config.json", "{  }")
    assert refusal(folder) == "F/tokenizer_config.json must have at most 3 bytes, got 4"


def test_text_limits(folder, monkeypatch):
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(TokenizerError) as caught:
        tokenizer.encode("ab\ud800")
    message = "the text must be valid Unicode, got half of a surrogate pair ('\\ud800') at character 2"
    assert str(caught.value) == message
    monkeypatch.setattr(tokenizer, "max_text_len", 3)
    with pytest.raises(TokenizerError) as caught:
        tokenizer.encode("abcd")
    assert str(caught.value) == "the text must have at most 3 characters, got 4"
