"""Continuous batching over the C interface of llama.cpp: prompts fill batches, then all sequences step together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from workloads import Ask

BATCH_TOKENS = 2048
TOKENS_PER_SEQUENCE = 512
"""Context of each of several sequences; a single one has a multiple of BATCH_TOKENS."""


class LlamaCpp:
    """A model and a context for the number of sequences at hand, as a user would start it for them.

    Sequences are numbered from 0; their KV is dropped when the last has ended. `kv_unified` keeps its default.
    """

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_log_set(_say_nothing, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp could not load {path}"
        self.threads = threads
        self.num_ids = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.num_sequences = self.num_tokens = 0
        self.context: Any = None

    def _make_context(self, num_sequences: int, longest: int) -> None:
        one = -(-longest // BATCH_TOKENS) * BATCH_TOKENS
        num_tokens = one if num_sequences == 1 else num_sequences * TOKENS_PER_SEQUENCE
        if num_sequences == self.num_sequences and num_tokens <= self.num_tokens:
            return
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_tokens
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH_TOKENS, 512, num_sequences
        params.n_threads = params.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp could not make the context"
        self.num_sequences, self.num_tokens = num_sequences, num_tokens

    def complete(self, asks: Sequence[Ask]) -> list[list[int]]:
        """The greedy answers to all asks."""
        self._make_context(len(asks), max(len(ask.prompt) + ask.num_new for ask in asks))
        answers = [[token] for token in self._read_prompts(asks)]
        while running := [i for i, ask in enumerate(asks) if len(answers[i]) < ask.num_new]:
            self.batch.n_tokens = 0
            for i in running:
                self._put(answers[i][-1], len(asks[i].prompt) + len(answers[i]) - 1, i, wants_logits=True)
            for i, token in zip(running, self._decode(list(range(len(running)))), strict=True):
                answers[i].append(token)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        return answers

    def _read_prompts(self, asks: Sequence[Ask]) -> list[int]:
        """The first new token of each ask."""
        firsts: list[int] = []
        self.batch.n_tokens, ends = 0, []
        for i, ask in enumerate(asks):
            for position, token in enumerate(ask.prompt):
                if self.batch.n_tokens == BATCH_TOKENS:
                    firsts += self._decode(ends)
                    self.batch.n_tokens, ends = 0, []
                self._put(token, position, i, wants_logits=position == len(ask.prompt) - 1)
            ends.append(self.batch.n_tokens - 1)
        return firsts + self._decode(ends)

    def _put(self, token: int, position: int, sequence: int, *, wants_logits: bool) -> None:
        batch, n = self.batch, self.batch.n_tokens
        batch.token[n], batch.pos[n] = token, position
        batch.n_seq_id[n] = 1
        batch.seq_id[n][0] = sequence
        batch.logits[n] = wants_logits
        batch.n_tokens = n + 1

    def _decode(self, places: list[int]) -> list[int]:
        """Runs the batch; the likeliest token after each of its places."""
        code = llama_cpp.llama_decode(self.context, self.batch)
        assert code == 0, f"llama_decode returned {code}"
        return [self._best(place) for place in places]

    def _best(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        row: npt.NDArray[np.float32] = np.ctypeslib.as_array(logits, shape=(self.num_ids,))
        return int(row.argmax())


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, data: object) -> None:
    """Drops llama.cpp's log."""
