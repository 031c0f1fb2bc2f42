"""Computes the token masks of a step for all sequences with a grammar, without Python's lock."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sageLLM.runtime.grammar.constraint import GrammarConstraint

MAX_THREADS = 8


class MaskFiller:
    """Fills masks with llguidance's threads, which start with the first mask."""

    def __init__(self) -> None:
        self._executor: Any = None  # llguidance's LLExecutor

    def fill(self, constraints: Sequence[GrammarConstraint]) -> None:
        """Brings the matchers up to date and stores the masks. Each keeps its error."""
        matchers = [one.advance() for one in constraints]
        num_words = max((-(-one.num_tokens // 32) for one in constraints), default=0)
        masks = np.zeros((len(constraints), num_words), np.int32)
        jobs = [(matcher, row) for row, matcher in enumerate(matchers) if matcher is not None]
        if jobs:
            self._threads().unsafe_compute_mask_ptr(jobs, masks.ctypes.data, 4 * num_words, len(constraints))
        for matcher, constraint, words in zip(matchers, constraints, masks, strict=True):
            constraint.finish(words if matcher is not None else None)

    def _threads(self) -> Any:
        from llguidance import LLExecutor

        if self._executor is None:
            self._executor = LLExecutor(min(MAX_THREADS, os.cpu_count() or 1))
        return self._executor
