"""Messages between the engine and its workers: step orders, which carry differences only, and step results.

A worker keeps the tokens, the sampling state and the block table of each sequence that it serves. An order holds what
has changed since the last one, so the order of a steady decode step is almost empty. The engine may send the order of a
step before it has the result of the one before, as the worker has the newest tokens.
"""

from __future__ import annotations

import msgspec

from sageLLM.runtime.kv.copies import BlockCopy, TierCopy
from sageLLM.runtime.sampling.logprobs import ScoredTokens
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.scheduler.base import KVMigration


class NewSequence(msgspec.Struct, frozen=True):
    """A sequence that the worker does not have yet.

    `output_token_ids` are tokens that another worker generated, or this one before a restart. `banned_token_ids` must
    not be sampled before `params.min_tokens` tokens. `eos_token_ids` can end an answer with a grammar where the grammar
    accepts; others do not have them. `seed` is that of the request, or one chosen for it.
    """

    sequence_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    params: SamplingParams
    seed: int
    answer_index: int = 0
    banned_token_ids: list[int] = []
    eos_token_ids: list[int] = []


class TableUpdate(msgspec.Struct, frozen=True):
    """The blocks of a sequence from index `first` on; the worker has the ones before."""

    sequence_id: str
    first: int
    block_ids: list[int]


class ChunkOrder(msgspec.Struct, frozen=True):
    """Tokens `start .. start + num_tokens - 1` of prompt and output of a sequence, to be computed.

    Each sequence of `samples` gets a token from the logits of the last one: none if the chunk does not complete its
    sequence, else the sequence and its forks. The prompt tokens after the positions `scored` get log-probabilities.
    """

    sequence_id: str
    start: int
    num_tokens: int
    samples: list[str] = []
    scored: list[int] = []


class StepOrder(msgspec.Struct, frozen=True):
    """The work of one worker in one step.

    It is applied in this order: sequences are dropped, added, and get blocks; blocks are copied; the tokens are
    computed. `decodes` are the sequences that get one more token; None stands for those of the last order that named
    any, and `has_decodes` is false if there are none in this step.
    """

    dropped: list[str] = []
    new: list[NewSequence] = []
    tables: list[TableUpdate] = []
    block_copies: list[BlockCopy] = []
    tier_copies: list[TierCopy] = []
    has_decodes: bool = False
    decodes: list[str] | None = None
    chunks: list[ChunkOrder] = []


class GroupOrder(msgspec.Struct, frozen=True):
    """One step of all workers: `decode` is the order of the decode worker, or of the only one.

    Migrations copy blocks from the prefill worker's pool to the decode worker's before the tokens are computed.
    """

    decode: StepOrder | None = None
    prefill: StepOrder | None = None
    migrations: list[KVMigration] = []


class PromptScores(msgspec.Struct, frozen=True):
    """The log-probabilities of the prompt tokens after `positions`, one row per position."""

    sequence_id: str
    positions: list[int]
    scored: ScoredTokens


class StepResult(msgspec.Struct):
    """The result of an order: a token for each of the decodes and then for each of the chunks' `samples`, in order.

    `logprobs` has the rows that asked for them. Rows in `not_finite` have no valid token, nor has a sequence in
    `failures`, which maps it to the reason; the others are not affected.
    """

    token_ids: list[int]
    logprobs: dict[int, ScoredTokens] = {}
    prompt_scores: list[PromptScores] = []
    not_finite: list[int] = []
    failures: dict[str, str] = {}
