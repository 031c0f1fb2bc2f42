"""Samples the next token of the sequences of a batch. Reused while the same sequences decode."""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sageLLM.runtime.executor.token_reader import PendingTokens, ReadTokens
from sageLLM.runtime.grammar.constraint import GrammarConstraint
from sageLLM.runtime.sampling.logprobs import ScoredTokens
from sageLLM.runtime.sampling.sampler import SamplingBatch, SequenceSampling, sample
from sageLLM.runtime.sampling.share import Share
from sageLLM.runtime.sampling.shared_sampler import sample_shared
from sageLLM.runtime.worker.model_runner import Logits
from sageLLM.runtime.worker.sequences import WorkerSequence
from sageLLM.runtime.worker.step_inputs import Draws


class SampledRows(NamedTuple):
    """A token for each row, the log-probabilities of the rows that requested them, and the rows without a token."""

    token_ids: list[int]
    logprobs: dict[int, ScoredTokens]
    failed: Sequence[int]


class RowSampler:
    """Samples for `sequences`: sequence i has row i of the logits.

    What depends on the sequences only is computed once: a steady decode step reads the graph's argmax and little else.
    """

    def __init__(self, sequences: Sequence[WorkerSequence], share: Share | None = None) -> None:
        """With a `share` the logits are those of this rank, and the ranks choose the tokens together."""
        self.sequences = sequences
        self._share = share
        self._states: list[SequenceSampling] = [one.sampling for one in sequences if one.sampling is not None]
        # Whether tokens do not depend on those before, apart from the logits.
        self.is_plain_greedy = all(state.is_plain_greedy for state in self._states)
        # Whether a GPU chooses all tokens, which it draws where a temperature is given.
        is_plain = all(state.is_plain_greedy or state.is_plain_draw for state in self._states)
        self.is_on_device = share is None and is_plain
        self._drawn_rows = [row for row, state in enumerate(self._states) if state.is_plain_draw]
        self._temperatures = np.array([0.0 if one.params.is_greedy else one.params.temperature for one in self._states])
        # The rows that do not take the tokens of the graph, if ranks share the vocabulary.
        self._open_rows = [row for row, state in enumerate(self._states) if not state.is_plain_greedy]
        self.constraints = [one.constraint for one in self._states if isinstance(one.constraint, GrammarConstraint)]
        self._counts = np.arange(len(self._states))
        self._batch: SamplingBatch | None = None
        # The outputs of a plan are the same tensors in each steady step, so views of them are kept.
        self._logits: Logits | None = None
        self._values = np.zeros((0, 0), np.float32)
        self._ids = np.zeros(0, np.int64)

    def sample(self, logits: Logits) -> SampledRows:
        """Samples a token for every sequence. Rows of the logits after these are ignored."""
        if self._share is not None and logits.best is not None:
            return self._with_others(logits, logits.best, self._share)
        if logits.tokens is not None and self.is_on_device:
            return self._chosen_on_device(logits.tokens)
        if self.is_plain_greedy:
            return self._greedy(logits)
        values = logits.values[: len(self._states)]
        with torch.inference_mode():
            if self._batch is None:
                self._batch = SamplingBatch(self._states, values.device)
            sampled = sample(values, self._batch)
        return SampledRows(sampled.token_ids.tolist(), sampled.logprobs, sampled.failed)

    def draws(self, num_ahead: int) -> Draws | None:
        """What a GPU draws the next tokens with, when `num_ahead` tokens of each sequence are not in its list yet.

        None if no token is drawn, or if tokens are chosen on the host.
        """
        if not self.is_on_device or not self._drawn_rows:
            return None
        uniforms = np.zeros(len(self._states))
        for row in self._drawn_rows:
            uniforms[row] = self._states[row].uniform(num_ahead)
        return Draws(self._temperatures, uniforms)

    def alone(self, row: int, logits: Logits) -> tuple["RowSampler", Logits]:
        """The sampler of one sequence, and its logits."""
        rows = slice(row, row + 1)
        tokens = None if logits.tokens is None else logits.tokens.rows(rows)
        return RowSampler([self.sequences[row]]), Logits(logits.values[rows], logits.greedy_ids[rows], tokens=tokens)

    def _with_others(self, logits: Logits, best: Tensor, share: Share) -> SampledRows:
        """The tokens of the graph, and for other rows those that the ranks choose from their shares of the logits."""
        token_ids, failed = self._greedy_of_ranks(logits, best)
        if not self._open_rows:
            return SampledRows(token_ids, {}, failed)
        with torch.inference_mode():
            values = logits.values[: len(self._states)]
            if len(self._open_rows) < len(values):
                values = values[self._open_rows]
            if self._batch is None:
                self._batch = SamplingBatch([self._states[row] for row in self._open_rows], values.device)
            sampled = sample_shared(values, self._batch, share)
        for row, token_id in zip(self._open_rows, sampled.token_ids.tolist(), strict=True):
            token_ids[row] = token_id
        is_open = set(self._open_rows)
        failed = sorted([*(row for row in failed if row not in is_open), *(self._open_rows[i] for i in sampled.failed)])
        return SampledRows(token_ids, {self._open_rows[i]: one for i, one in sampled.logprobs.items()}, failed)

    def _greedy_of_ranks(self, logits: Logits, best: Tensor) -> ReadTokens:
        if logits.tokens is not None:
            return logits.tokens.read(len(self._states))
        token_ids: list[int] = logits.greedy_ids[: len(self._states)].tolist()
        highest = best[: len(self._states)].tolist()
        return ReadTokens(token_ids, [row for row, one in enumerate(highest) if not isfinite(one)])

    def _greedy(self, logits: Logits) -> SampledRows:
        """The graph's argmax; rows without a finite maximum have failed.

        NumPy, because every torch function gives up Python's lock, and the engine's thread would take it now.
        """
        last = self._logits
        if last is None or last.values is not logits.values or last.greedy_ids is not logits.greedy_ids:
            self._logits = logits
            self._values = logits.values.numpy()
            self._ids = logits.greedy_ids.numpy()[: len(self._states)]
        highest: list[float] = self._values[self._counts, self._ids].tolist()
        # The sum of finite float32 is finite in float64, which Python adds in.
        failed = () if isfinite(sum(highest)) else [row for row, one in enumerate(highest) if not isfinite(one)]
        return SampledRows(self._ids.tolist(), {}, failed)

    def _chosen_on_device(self, tokens: PendingTokens) -> SampledRows:
        token_ids, failed = tokens.read(len(self._states))
        return SampledRows(token_ids, {}, failed)
