"""Increments of text: joined they equal the decoded whole, and no increment has an incomplete character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sageLLM.runtime.text.detokenizer import (
    MAX_HELD_TOKENS,
    NUM_PROMPT_TOKENS,
    REPLACEMENT,
    Detokenizer,
    common_prefix_len,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("你好👩‍é a\n", max_size=40)


FAMILIES = ["byte_level", "sentencepiece_like", "metaspace", "word_piece"]


def increments(tokenizer, token_ids, skip_special_tokens=True, prompt=()):
    detokenizer = Detokenizer(tokenizer, skip_special_tokens, prompt)
    return [*(detokenizer.append(token_id) for token_id in token_ids), detokenizer.flush()]


@settings(max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_byte_level_random_tokens_join_to_the_whole(byte_level, data, skip):
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3), max_size=80))
    assert "".join(increments(byte_level, ids, skip)) == byte_level.decode(ids, skip)


@settings(max_examples=200)
@given(data=st.data())
def test_byte_level_runs_of_broken_bytes_join_to_the_whole(byte_level, data):
    """Only tokens of bytes above 127, which are rarely valid UTF-8, so that the held tokens reach their bound."""
    high = [i for i in range(byte_level.vocab_size) if REPLACEMENT in byte_level.decode([i])]
    ids = data.draw(st.lists(st.sampled_from(high), max_size=120))
    assert "".join(increments(byte_level, ids)) == byte_level.decode(ids)


@settings(max_examples=200)
@given(text=texts)
def test_increments_of_real_text_are_whole_characters(byte_level, sentencepiece_like, text):
    for tokenizer in (byte_level, sentencepiece_like):
        ids = tokenizer.encode(text, add_special_tokens=False)
        parts = increments(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        if REPLACEMENT not in text:
            assert not any(REPLACEMENT in part for part in parts)


@settings(max_examples=150)
@given(data=st.data(), skip=st.booleans())
def test_sentencepiece_random_tokens_join_to_the_whole(sentencepiece_like, data, skip):
    """Runs of bytes, valid and invalid, of up to the number of tokens that are held; ids without text among them."""
    bytes_ = st.lists(st.integers(3, 258) | st.just(10**6), max_size=MAX_HELD_TOKENS - 1)
    pieces = st.integers(259, sentencepiece_like.vocab_size - 1).map(lambda i: [i])
    words = st.text("你👩é", max_size=4).map(lambda text: sentencepiece_like.encode(text, add_special_tokens=False))
    parts = data.draw(st.lists(st.tuples(bytes_ | words, pieces), max_size=10))
    ids = [i for run, piece in parts for i in (*run, *piece)]
    expected = sentencepiece_like.decode(ids, skip)
    assert "".join(increments(sentencepiece_like, ids, skip)) == expected
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = Detokenizer(sentencepiece_like, skip)
    assert detokenizer.extend(ids[:cut]) + detokenizer.flush(ids[cut:]) == expected


def test_a_space_ends_a_run_of_bytes(sentencepiece_like):
    """The two runs have more than MAX_HELD_TOKENS bytes together."""
    word = sentencepiece_like.encode("é你你你", add_special_tokens=False)
    ids = [*word, word[0], 3, 3, 131, 259]
    assert "".join(increments(sentencepiece_like, ids)) == sentencepiece_like.decode(ids)


@settings(max_examples=200)
@given(data=st.data())
def test_sentencepiece_any_bytes_never_lose_later_text(sentencepiece_like, data):
    ids = data.draw(st.lists(st.integers(3, 258), max_size=60))
    letters = sentencepiece_like.encode("the end", add_special_tokens=False)
    joined = "".join(increments(sentencepiece_like, [*ids, *letters]))
    assert joined.replace(" ", "").endswith("theend")


def test_a_character_of_four_tokens_is_emitted_at_once(sentencepiece_like):
    ids = sentencepiece_like.encode("👩", add_special_tokens=False)
    assert [part for part in increments(sentencepiece_like, ids) if part][-1].endswith("👩")
    assert sum("👩" in part for part in increments(sentencepiece_like, ids)) == 1


def test_leading_space_is_dropped_once_only(sentencepiece_like):
    ids = sentencepiece_like.encode("a the", add_special_tokens=False)
    assert "".join(increments(sentencepiece_like, ids)) == "a the"


def test_an_incomplete_character_at_the_end_is_flushed(sentencepiece_like):
    ids = sentencepiece_like.encode("👩", add_special_tokens=False)[:-1]
    assert "".join(increments(sentencepiece_like, ids)).strip() == sentencepiece_like.decode(ids).strip()


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_shown_only_if_asked_for(byte_level, skip):
    ids = [0, *byte_level.encode("hi", add_special_tokens=False), 1]
    assert "".join(increments(byte_level, ids, skip)) == ("hi" if skip else "<|begin|>hi<|end|>")


def test_the_window_stays_short_whatever_comes(byte_level):
    """A request can force such tokens with logit_bias; a growing window would make the engine quadratic."""
    broken = next(i for i in range(byte_level.vocab_size) if byte_level.decode([i]) == REPLACEMENT)
    for token_id in (0, broken, byte_level.vocab_size + 5, *byte_level.encode("a", add_special_tokens=False)):
        detokenizer = Detokenizer(byte_level)
        for _ in range(500):
            detokenizer.append(token_id)
        assert len(detokenizer._ids) <= 2 * MAX_HELD_TOKENS


def minus_prompt(tokenizer, prompt, answer, skip=True) -> str:
    """decode(prompt + answer) minus decode(prompt), with the decode of transformers."""
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
    before, both = reference.decode(prompt, **options), reference.decode([*prompt, *answer], **options)
    assert both.startswith(before)
    return both[len(before) :]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=100)
@given(data=st.data(), skip=st.booleans())
def test_the_answer_is_what_it_adds_to_the_prompt(families, family, data, skip):
    """Any tokens without split characters, cut anywhere into prompt and answer."""
    tokenizer = families[family]
    whole = [i for i in range(tokenizer.vocab_size) if REPLACEMENT not in tokenizer.decode([i], False)]
    if family == "sentencepiece_like":
        whole = [i for i in whole if not 3 <= i < 259]
    prompt, answer = (data.draw(st.lists(st.sampled_from(whole), max_size=30)) for _ in range(2))
    expected = minus_prompt(tokenizer, prompt, answer, skip)
    assert "".join(increments(tokenizer, answer, skip, prompt)) == expected
    detokenizer = Detokenizer(tokenizer, skip, prompt)
    assert detokenizer.extend(answer) + detokenizer.flush() == expected


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece_like"])
@settings(max_examples=200)
@given(data=st.data())
def test_a_text_cut_at_any_token_goes_on_where_the_prompt_ends(families, family, data):
    """A character that the cut splits belongs to the answer, in which its last byte is."""
    tokenizer = families[family]
    text = data.draw(texts.filter(lambda text: REPLACEMENT not in text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.decode(ids)
    prompt_len = max(common_prefix_len(whole, tokenizer.decode(ids[:end])) for end in range(max(0, cut - 3), cut + 1))
    assert "".join(increments(tokenizer, ids[cut:], prompt=ids[:cut])) == whole[prompt_len:]


def test_invalid_bytes_of_the_prompt_are_not_part_of_the_answer(byte_level):
    broken = next(i for i in range(byte_level.vocab_size) if byte_level.decode([i]) == REPLACEMENT)
    prompt = [*byte_level.encode("ab", add_special_tokens=False), broken]
    answer = byte_level.encode("c", add_special_tokens=False)
    assert increments(byte_level, answer, prompt=prompt) == ["c", ""]
    assert increments(byte_level, [], prompt=prompt) == [""]
    assert increments(byte_level, answer, prompt=[broken] * 40) == ["c", ""]


def test_only_the_end_of_the_prompt_is_decoded(sentencepiece_like):
    detokenizer = Detokenizer(sentencepiece_like, True, [1] * 10**5)
    assert detokenizer._ids == []
    prompt = sentencepiece_like.encode("the " * 1000, add_special_tokens=False)
    assert len(Detokenizer(sentencepiece_like, True, prompt)._ids) == NUM_PROMPT_TOKENS
