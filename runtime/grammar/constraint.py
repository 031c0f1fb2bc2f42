"""The grammar of one sequence: a matcher that follows the tokens of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sageLLM.runtime.grammar.compiler import GrammarCompiler
from sageLLM.runtime.grammar.matcher import Matcher
from sageLLM.runtime.sampling.structured_outputs import StructuredOutputsParams

Words = npt.NDArray[np.int32]
"""A mask with one bit per token."""


class Waiting(Protocol):
    """The computation of a mask that may still run."""

    def wait(self) -> None: ...


class GrammarConstraint:
    """Decides which tokens may come next.

    The state of the matcher is a function of `token_ids`, the tokens of the answer so far, which the owner extends.
    So a sequence that is preempted, swapped, forked, moved to another worker or replayed needs no further state.
    """

    def __init__(
        self,
        compiler: GrammarCompiler,
        params: StructuredOutputsParams,
        eos_ids: Sequence[int],
        token_ids: Sequence[int],
    ) -> None:
        self._compiler, self._params, self._eos_ids = compiler, params, list(eos_ids)
        self._token_ids = token_ids
        self._matcher: Matcher | None = None
        self._num_consumed = 0
        self._error: Exception | None = None
        self._bias: Tensor | None = None
        self.pending: Waiting | None = None

    @property
    def num_tokens(self) -> int:
        """The length of the masks in tokens, once there is a matcher."""
        return self._compiler.num_mask_tokens

    def advance(self) -> Matcher | None:
        """The matcher after all tokens so far, to compute a mask with; None if there was an error, or at the end."""
        self._bias = None
        if self._error is not None:
            return None
        try:
            return self._advance()
        except Exception as error:
            self._error = error
            return None

    def _advance(self) -> Matcher | None:
        if self._matcher is None:
            self._matcher = self._compiler.matcher(self._params, self._eos_ids)
        new = self._token_ids[self._num_consumed :]
        if new and not self._matcher.is_stopped() and not self._matcher.consume_tokens(list(new)):
            raise RuntimeError(f"the grammar has failed: {self._matcher.get_error()}")
        self._num_consumed += len(new)
        return None if self._matcher.is_stopped() else self._matcher

    def finish(self, words: Words | None) -> None:
        """Stores the mask of a matcher; without one, only the end of the answer is allowed."""
        if self._error is not None:
            return
        try:
            self._bias = self._end_bias() if words is None else self._bias_of(words)
        except Exception as error:
            self._error = error

    def bias(self) -> Tensor:
        """What to add to the logits: 0 for the tokens that may come next and -inf for the others, f32[V]."""
        if self.pending is not None:
            self.pending.wait()
        if self._error is not None:
            raise self._error
        assert self._bias is not None, "the mask of a step must be started before its tokens are sampled"
        return self._bias

    def _bias_of(self, words: Words) -> Tensor:
        assert self._matcher is not None
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar has failed: {self._matcher.get_error()}")
        bits = np.unpackbits(words.view(np.uint8), count=self._compiler.vocab_size, bitorder="little")
        if not bits.any():
            raise RuntimeError("the grammar admits no token of the model's vocabulary")
        return torch.where(torch.from_numpy(bits).bool(), 0.0, -torch.inf)

    def _end_bias(self) -> Tensor:
        bias = torch.full((self._compiler.vocab_size,), -torch.inf)
        bias[[token for token in self._eos_ids if token < len(bias)]] = 0.0
        return bias
