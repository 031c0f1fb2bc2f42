"""Texts of single tokens: joined they are the answer, with leading spaces and with characters of several tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

FAMILIES = ["byte_level", "sentencepiece_like", "metaspace", "word_piece"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("你好👩‍é a\n", max_size=40)


def token_texts(tokenizer, token_ids):
    return [tokenizer.token_text(token_id, token_ids[max(0, i - 3) : i]) for i, token_id in enumerate(token_ids)]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=100)
@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_the_texts_of_all_tokens_join_to_the_text(families, family, text):
    tokenizer = families[family]
    ids = tokenizer.encode("a " + text, add_special_tokens=False)
    if family == "metaspace":  # this decoder has no byte fallback
        ids = [i for i in ids if not 3 <= i < 259]
    assert "".join(token_texts(tokenizer, ids)).removeprefix(" ") == tokenizer.decode(ids, False)


def test_a_token_keeps_its_leading_space(sentencepiece_like, metaspace, byte_level):
    for tokenizer in (sentencepiece_like, metaspace):
        assert tokenizer.token_text(tokenizer._backend.token_to_id("▁th")) == " th"
        assert tokenizer.token_text(tokenizer._backend.token_to_id("th")) == "th"
        assert tokenizer.token_text(tokenizer._backend.token_to_id("</s>")) == "</s>"
    (space,) = byte_level.encode(" ", add_special_tokens=False)
    assert byte_level.token_text(space) == " "
    assert byte_level.token_text(10**6) == ""


def test_the_last_token_of_a_character_has_all_of_it(sentencepiece_like):
    ids = sentencepiece_like.encode("a👩", add_special_tokens=False)
    assert token_texts(sentencepiece_like, ids)[-5:] == [" a", "", "", "", "👩"]
    assert sentencepiece_like.token_text(ids[-1]) == ""
