"""Tokens that tokenizer.json lacks: ids, texts and the end of sequence are those of transformers' AutoTokenizer."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from sageLLM.runtime.errors import TokenizerError
from sageLLM.runtime.text.added_tokens import MAX_ADDED_TOKENS
from sageLLM.runtime.text.tokenizer import Tokenizer

TEXT = "def <|im_end|> add<eot>(a,<extra> b) <image>\n</s><other>"


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False} | flags


CASES = {
    "decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"400": token("<|im_end|>", special=True)}}},
    "decoder in the order of ids": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                "500": token("<extra>", special=True),
                "401": token("<other>", special=False),
                "402": token("<eot>", special=False, rstrip=True, lstrip=True),
            },
            "eos_token": "<eot>",
        }
    },
    "eos token": {"tokenizer_config.json": {"eos_token": "<eot>"}},
    "eos token as an object": {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", **token("<eot>")}}},
    "several named": {"tokenizer_config.json": {"pad_token": "<other>", "eos_token": "<eot>", "bos_token": "</s>"}},
    "additional": {"tokenizer_config.json": {"additional_special_tokens": ["<extra>", "<other>"]}},
    "extra list": {"tokenizer_config.json": {"extra_special_tokens": ["<extra>"], "eos_token": "<eot>"}},
    "extra names": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<image>", "x": "<extra>"}}},
    "own name": {"tokenizer_config.json": {"image_token": "<image>"}},
    "map": {"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": token("<eot>")}},
    "added tokens": {
        "tokenizer_config.json": {},
        "special_tokens_map.json": {"eos_token": "<eot>"},
        "added_tokens.json": {"<extra>": 501, "<eot>": 500},
    },
    "a decoder replaces the other files": {
        "tokenizer_config.json": {"added_tokens_decoder": {"400": token("<|im_end|>", special=True)}},
        "added_tokens.json": {"<extra>": 501},
    },
}


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece_like"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_transformers(tmp_path, families, family, name):
    families[family]._backend.save(str(tmp_path / "tokenizer.json"))
    for file_name, values in CASES[name].items():
        if file_name == "tokenizer_config.json":
            values = {"tokenizer_class": "PreTrainedTokenizerFast", **values}
        (tmp_path / file_name).write_text(json.dumps(values))
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(TEXT)["input_ids"]
    assert ours.encode(TEXT) == ids
    assert ours.vocab_size == len(theirs)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_ids == ({theirs.eos_token_id} - {None})
    assert dict(ours.special_tokens) == theirs.special_tokens_map


def test_a_complete_tokenizer_is_not_changed(tmp_path, byte_level):
    byte_level._backend.save(str(tmp_path / "tokenizer.json"))
    config = {"added_tokens_decoder": {"0": token("<|begin|>", special=True)}, "eos_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(tmp_path)._backend.to_str() == byte_level._backend.to_str()


def test_texts_that_no_prompt_contains_are_ignored(tmp_path, byte_level):
    byte_level._backend.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "a\ud800", "pad_token": "", "extra_special_tokens": ["\udfff", 3, {"content": None}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"\ud800": 1, "": 2, "x": "3"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == byte_level.vocab_size
    assert (tokenizer.eos_token_ids, dict(tokenizer.special_tokens)) == (frozenset(), {})


def test_the_number_of_new_tokens_is_limited(tmp_path, byte_level):
    byte_level._backend.save(str(tmp_path / "tokenizer.json"))
    config = {"extra_special_tokens": [f"<{i}>" for i in range(MAX_ADDED_TOKENS + 1)]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(caught.value) == f"{tmp_path} must name at most 65536 tokens that tokenizer.json lacks, got 65537"


@pytest.mark.parametrize("decoder", [{"x": token("<eot>")}, {"4": "<eot>"}, {"4": {"content": 3}}, {"-1": token("a")}])
def test_a_damaged_decoder_is_refused(tmp_path, byte_level, decoder):
    byte_level._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/tokenizer_config.json: added_tokens_decoder must map token ids to objects with a content, "
        f"got {next(iter(decoder))!r}"
    )
