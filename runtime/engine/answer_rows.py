"""The answers of a batch that decodes. While none can end, a step's tokens are appended without looking at each one."""

from __future__ import annotations

from typing import NamedTuple

from sageLLM.runtime.engine.sequences import Sequence as Answer


class Progress(NamedTuple):
    """The answers with a new token or an end, and those of them that have ended."""

    changed: list[Answer]
    ended: list[Answer]


class AnswerRows:
    """The answers of a list, which must not change: row i is answer i. Valid as long as none of them ends.

    The kernels of a step have filled the caches, so an answer costs what must be fetched for it: here the list of its
    tokens only.
    """

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        texts = [answer.text for answer in answers]
        self._token_ids = [text.token_ids for text in texts]
        self._end_ids = frozenset().union(*(text.end_ids for text in texts))
        self._num_steps = min((text.num_unchecked for text in texts), default=0)

    def append(self, token_ids: list[int]) -> bool:
        """Appends a token to each answer; False, and no change, if one of them may end with it, now and later on."""
        if self._num_steps <= 0 or not self._end_ids.isdisjoint(token_ids):
            self._num_steps = 0
            return False
        self._num_steps -= 1
        for answer, token_id in zip(self._token_ids, token_ids, strict=True):
            answer.append(token_id)
        return True
