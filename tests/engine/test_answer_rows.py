"""Tokens of a whole batch at once: as one by one, up to the first step in which an answer may end."""

from typing import Any

from sageLLM.runtime.engine.answer_rows import AnswerRows
from sageLLM.runtime.engine.requests import stop_rules
from sageLLM.runtime.engine.sequences import Sequence, make_group
from sageLLM.runtime.sampling.sampling_params import SamplingParams

EOS = 7


def answers(*options: dict[str, Any]) -> list[Sequence]:
    """An answer of a request with each of these parameters."""
    found = []
    for number, one in enumerate(options):
        params = SamplingParams(**{"max_tokens": 10, **one})
        rules = stop_rules(params, frozenset({EOS}), 2, 100)
        found += make_group(f"r{number}", None, [1, 2], params, rules, None).sequences
    return found


def lengths(rows: AnswerRows) -> list[int]:
    return [len(one.request.output_token_ids) for one in rows.answers]


def test_tokens_reach_the_requests_and_the_texts() -> None:
    rows = AnswerRows(answers({}, {}))
    assert rows.append([4, 5]) and rows.append([6, 8])
    first, second = rows.answers
    assert (first.request.output_token_ids, second.text.token_ids) == ([4, 6], [5, 8])


def test_a_token_that_may_end_an_answer_is_left_to_its_rules() -> None:
    rows = AnswerRows(answers({}, {"stop_token_ids": [9]}))
    assert rows.append([3, 3])
    assert not rows.append([9, 3])  # 9 ends the other answer only, but the step is not taken apart
    assert not rows.append([3, 3])
    assert lengths(rows) == [1, 1]


def test_an_ignored_end_of_sequence_does_not_count() -> None:
    rows = AnswerRows(answers({"ignore_eos": True}))
    assert rows.append([EOS])
    rows = AnswerRows(answers({}))
    assert not rows.append([EOS]) and not rows.append([3])
    assert lengths(rows) == [0]


def test_the_last_token_is_left_to_the_rules() -> None:
    rows = AnswerRows(answers({"max_tokens": 3}, {"max_tokens": 9}))
    assert [rows.append([3, 4]) for _ in range(4)] == [True, True, False, False]
    assert lengths(rows) == [2, 2]
    assert rows.answers[0].text.append(3) == "length"


def test_answers_with_stop_strings_or_an_end_are_never_plain() -> None:
    assert not AnswerRows(answers({}, {"stop": ["a"]})).append([3, 3])
    ended = answers({}, {})
    ended[1].abort("aborted")
    assert not AnswerRows(ended).append([3, 3])
