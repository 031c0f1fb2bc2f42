"""Ends of sequences: the rule, the remaining text, and that a stop string is never streamed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.runtime.engine.requests import stop_rules
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.text.stop import SequenceText, StopMatch, find_stop, visible_len


class LetterTokenizer:
    """A tokenizer in which token i is the i-th text of a list, so that a test chooses the texts of tokens."""

    special_ids = frozenset({0})
    byte_ids = frozenset()

    def __init__(self, texts):
        self.texts = ["<eos>", *texts]

    def whole_text(self, token_id):
        return self.texts[token_id]

    def decode(self, token_ids, skip_special_tokens=True):
        return "".join(self.texts[i] for i in token_ids if not (skip_special_tokens and i == 0))


def run(texts, params, *, eos_after=None, prompt_len=1, max_model_len=1000):
    """Feeds the texts token by token until the sequence ends; returns the sequence and the deltas."""
    rules = stop_rules(params, frozenset({0}), prompt_len, max_model_len)
    sequence = SequenceText(LetterTokenizer(texts), rules, params.skip_special_tokens)
    ids = list(range(1, len(texts) + 1))
    if eos_after is not None:
        ids.insert(eos_after, 0)
    deltas = []
    for token_id in ids:
        finished = sequence.append(token_id)
        deltas.append(sequence.take_delta())
        if finished:
            break
    assert "".join(deltas) == sequence.text
    return sequence, deltas


def ending(sequence):
    return sequence.text, sequence.finish_reason, sequence.stop_reason


def test_stop_string_across_tokens_is_never_shown():
    sequence, deltas = run(["a", "b\n", "\nc", "d"], SamplingParams(stop="\n\nc"))
    assert deltas == ["a", "b", ""]
    assert ending(sequence) == ("ab", "stop", "\n\nc")
    assert sequence.token_ids == [1, 2, 3]


def test_a_held_beginning_is_shown_when_it_turns_out_to_be_none():
    _, deltas = run(["x", "EN", "E", "ND", "!"], SamplingParams(stop="END!?"))
    assert deltas == ["x", "", "EN", "", ""]


def test_a_held_beginning_is_shown_at_the_end():
    sequence, deltas = run(["x", "EN"], SamplingParams(stop="END", max_tokens=2))
    assert deltas == ["x", "EN"]
    assert ending(sequence) == ("xEN", "length", None)


def test_stop_string_may_be_kept():
    sequence, _ = run(["ab", "cde"], SamplingParams(stop=["bcd"], include_stop_str_in_output=True))
    assert ending(sequence) == ("abcd", "stop", "bcd")


def test_the_earliest_stop_string_wins_then_the_longest():
    assert find_stop("xabcy", ["bc", "a"], 0) == StopMatch(1, "a")
    assert find_stop("xabcy", ["ab", "abc"], 0) == StopMatch(1, "abc")
    assert find_stop("abab", ["ab"], 2) == StopMatch(2, "ab")
    assert find_stop("abxx", ["ab"], 2) is None


def test_the_longest_beginning_of_a_stop_string_is_held():
    assert visible_len("xaab", ["aabc", "b!"]) == 1
    assert visible_len("xaab", ["b!"]) == 3
    assert visible_len("xaab", []) == 4
    assert visible_len("aba", ["aba"]) == 2


def test_eos_ends_without_reason_and_without_text():
    sequence, _ = run(["a", "b"], SamplingParams(), eos_after=1)
    assert ending(sequence) == ("a", "stop", None)
    assert sequence.token_ids == [1, 0]
    sequence, _ = run(["a", "b"], SamplingParams(skip_special_tokens=False), eos_after=1)
    assert sequence.text == "a"
    shown = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    sequence, _ = run(["a", "b"], shown, eos_after=1)
    assert ending(sequence) == ("a<eos>", "stop", None)


def test_ignore_eos_goes_on():
    sequence, _ = run(["a", "b"], SamplingParams(ignore_eos=True, max_tokens=3), eos_after=1)
    assert ending(sequence) == ("ab", "length", None)


def test_stop_id_is_the_reason():
    sequence, _ = run(["a", "b", "c"], SamplingParams(stop_token_ids=[2]))
    assert ending(sequence) == ("a", "stop", 2)
    sequence, _ = run(["a", "b", "c"], SamplingParams(stop_token_ids=[2], include_stop_str_in_output=True))
    assert ending(sequence) == ("ab", "stop", 2)


def test_max_tokens_and_model_length():
    assert ending(run(["a"] * 9, SamplingParams(max_tokens=3))[0]) == ("aaa", "length", None)
    assert ending(run(["a"] * 9, SamplingParams(max_tokens=None), prompt_len=6, max_model_len=8)[0])[0] == "aa"


def test_a_stop_at_the_last_token_is_a_stop():
    assert ending(run(["a", "b"], SamplingParams(max_tokens=2, stop="b"))[0]) == ("a", "stop", "b")
    assert ending(run(["a"], SamplingParams(max_tokens=2), eos_after=1)[0]) == ("a", "stop", None)


def test_min_tokens_keeps_every_stop_away():
    texts = ["s", "s", "s", "s"]
    assert ending(run(texts, SamplingParams(min_tokens=2, stop="s"))[0]) == ("ss", "stop", "s")
    assert ending(run(texts, SamplingParams(min_tokens=2, max_tokens=4), eos_after=1)[0]) == ("sss", "length", None)
    straddling = SamplingParams(min_tokens=2, stop="bc")
    assert ending(run(["a", "b", "c"], straddling)[0]) == ("a", "stop", "bc")


def test_ids_banned_before_min_tokens():
    rules = stop_rules(SamplingParams(min_tokens=2, stop_token_ids=[9, 4]), frozenset({7}), 1, 10)
    assert rules.banned_before_min_tokens == (4, 7, 9)
    assert stop_rules(SamplingParams(stop_token_ids=[9]), frozenset({7}), 1, 10).banned_before_min_tokens == ()
    ignoring = SamplingParams(min_tokens=2, ignore_eos=True)
    assert stop_rules(ignoring, frozenset({7}), 1, 10).banned_before_min_tokens == ()


def test_abort_keeps_what_was_said():
    params = SamplingParams(stop="bcd")
    sequence = SequenceText(LetterTokenizer(["ab", "c"]), stop_rules(params, frozenset(), 1, 10))
    sequence.append(1)
    sequence.abort()
    sequence.abort()
    assert ending(sequence) == ("ab", "abort", None)
    with pytest.raises(AssertionError, match="appended to a finished sequence"):
        sequence.append(2)


def test_without_a_tokenizer_ids_and_length_still_stop():
    sequence = SequenceText(None, stop_rules(SamplingParams(stop_token_ids=[5]), frozenset(), 1, 10))
    assert [sequence.append(4), sequence.append(5)] == [None, "stop"]
    assert ending(sequence) == ("", "stop", 5)


def test_a_stop_string_in_bytes_that_waited_for_a_character_is_found(byte_level):
    """The last token is half a character after the stop string; both are held until the end."""
    ids = byte_level.encode("a!", add_special_tokens=False)
    half = byte_level.encode("你", add_special_tokens=False)[:1]
    sequence = SequenceText(byte_level, stop_rules(SamplingParams(stop="!", max_tokens=9), frozenset(), 1, 99))
    for token_id in [*half, *ids]:
        if sequence.append(token_id):
            break
    assert sequence.finish_reason == "stop"
    assert "!" not in sequence.text


pieces = st.lists(st.text("ab", min_size=0, max_size=3), min_size=1, max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=500)
@given(pieces, stops, st.booleans())
def test_what_is_streamed_is_the_text_cut_at_the_first_stop(texts, stop_strings, keep):
    """Against a search in the text after each token: the answer is cut where the first completed match starts."""
    params = SamplingParams(stop=stop_strings, include_stop_str_in_output=keep, max_tokens=len(texts))
    sequence, _ = run(texts, params)
    expected, reason = "".join(texts), None
    for num in range(1, len(texts) + 1):
        text = "".join(texts[:num])
        found = sorted((text.find(stop), -len(stop), stop) for stop in stop_strings if stop in text)
        if found:
            start, _, reason = found[0]
            expected = text[: start + (len(reason) if keep else 0)]
            break
    assert ending(sequence) == (expected, "stop" if reason else "length", reason)
