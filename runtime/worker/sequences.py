"""The sequences on a worker: tokens, sampling state and block tables, kept up to date by step orders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

from sageLLM.runtime.sampling.sampler import SequenceSampling
from sageLLM.runtime.worker.orders import ChunkOrder, NewSequence, StepOrder


@dataclass(slots=True, eq=False)
class WorkerSequence:
    """One sequence. The worker appends each token that it samples."""

    sequence_id: str
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    sampling: SequenceSampling | None = None  # None for a sequence that is only embedded

    @classmethod
    def from_order(cls, new: NewSequence) -> "WorkerSequence":
        outputs = list(new.output_token_ids)  # a copy: the engine appends to its own list when a result arrives
        sampling = SequenceSampling(
            new.params, new.prompt_token_ids, outputs, new.banned_token_ids, new.answer_index, seed=new.seed
        )
        return cls(new.sequence_id, new.prompt_token_ids, outputs, sampling=sampling)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def last_token_id(self) -> int:
        return (self.output_token_ids or self.prompt_token_ids)[-1]

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens `start .. end - 1` of prompt and output."""
        split = len(self.prompt_token_ids)
        outputs = self.output_token_ids[max(0, start - split) : max(0, end - split)]
        return [*self.prompt_token_ids[start : min(end, split)], *outputs]


@dataclass(slots=True)
class SequenceChunk:
    """Tokens of a sequence to compute in a step, the sequences that get a token from it, and positions to score."""

    sequence: WorkerSequence
    start: int
    num_tokens: int
    samples: list[WorkerSequence] = field(default_factory=list)
    scored: Sequence[int] = ()


MAX_KEPT_STEPS = 64
"""Steps of `DecodeBatch` that are kept; more would delay the step that moves them to the sequences."""


class DecodeBatch(Sequence[WorkerSequence]):
    """The sequences that decode. New tokens are kept by step, and moved to the sequences when one of them is read.

    So a steady decode step touches none of the sequences: their memory would have to be fetched each time, as the
    kernels of the step before have filled the caches. Append to a sequence itself only after reading it from here.
    """

    def __init__(self, sequences: Sequence[WorkerSequence] = ()) -> None:
        self._sequences = list(sequences)
        self._steps: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._sequences)

    @overload
    def __getitem__(self, index: int) -> WorkerSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[WorkerSequence]: ...
    def __getitem__(self, index: int | slice) -> WorkerSequence | list[WorkerSequence]:
        self.settle()
        return self._sequences[index]

    def append(self, token_ids: list[int]) -> None:
        """Appends a token to each sequence."""
        self._steps.append(token_ids)
        if len(self._steps) >= MAX_KEPT_STEPS:
            self.settle()

    @property
    def num_kept(self) -> int:
        """The tokens of each sequence that are not in it yet."""
        return len(self._steps)

    def last_token_ids(self) -> list[int]:
        return self._steps[-1] if self._steps else [sequence.last_token_id for sequence in self._sequences]

    def block_id(self, row: int, index: int) -> int:
        """The block `index` of the sequence of a row."""
        return self._sequences[row].block_ids[index]

    @cached_property
    def members(self) -> frozenset[int]:
        """The identities of the sequences."""
        return frozenset(map(id, self._sequences))

    def settle(self) -> None:
        """Moves the tokens that are kept to their sequences."""
        if self._steps:
            for sequence, token_ids in zip(self._sequences, zip(*self._steps, strict=True), strict=True):
                sequence.output_token_ids += token_ids
            self._steps.clear()


NO_DECODES = DecodeBatch()


class SequenceTable:
    """The sequences of a worker by id, and those that decode.

    Pipeline stages decode `num_batches` micro-batches in turns. The batches of the last orders are kept: an order that
    names the sequences of one again gets the same object, if nothing else was done with them in between.
    """

    def __init__(self, num_batches: int = 1) -> None:
        self._sequences: dict[str, WorkerSequence] = {}
        self._decodes = DecodeBatch()
        self._num_kept = num_batches if num_batches > 1 else 0
        self._kept: list[tuple[list[str], DecodeBatch]] = []

    def update(self, order: StepOrder) -> None:
        """Applies what has changed since the last order."""
        for sequence_id in order.dropped:
            self._change(self._sequences.pop(sequence_id))
        for new in order.new:
            self._sequences[new.sequence_id] = WorkerSequence.from_order(new)
        for table in order.tables:
            sequence = self._sequences[table.sequence_id]
            if table.first < len(sequence.block_ids):
                self._change(sequence)
            sequence.block_ids[table.first :] = table.block_ids
        if order.decodes is not None:
            last, self._decodes = self._decodes, self._batch_of(order.decodes)
            if not any(batch is last for _, batch in self._kept):
                last.settle()

    def _batch_of(self, sequence_ids: list[str]) -> DecodeBatch:
        """The kept batch of these sequences, or a new one."""
        for names, batch in self._kept:
            if names == sequence_ids:
                return batch
        sequences = [self._sequences[sequence_id] for sequence_id in sequence_ids]
        if not self._num_kept:
            return DecodeBatch(sequences)
        self._change(*sequences)
        if len(self._kept) == self._num_kept:
            self._kept.pop(0)[1].settle()
        self._kept.append((sequence_ids, DecodeBatch(sequences)))
        return self._kept[-1][1]

    def _change(self, *sequences: WorkerSequence) -> None:
        """Something other than a decode of a kept batch follows for these sequences: gives up the batches with any."""
        self._decodes.settle()
        if not self._num_kept:
            return
        changed = set(map(id, sequences))
        given_up = [one for one in self._kept if not changed.isdisjoint(one[1].members)]
        for one in given_up:
            one[1].settle()
            self._kept.remove(one)

    def sampling(self, sequence_id: str) -> SequenceSampling:
        """The sampling state of a sequence that generates."""
        found = self._sequences[sequence_id].sampling
        assert found is not None, "sequences of orders generate"
        return found

    @property
    def num_decodes(self) -> int:
        return len(self._decodes)

    def decodes(self, order: StepOrder) -> DecodeBatch:
        """The decodes of the order; the same object as before if they have not changed."""
        return self._decodes if order.has_decodes else NO_DECODES

    def chunk(self, order: ChunkOrder) -> SequenceChunk:
        samples = [self._sequences[sequence_id] for sequence_id in order.samples]
        sequence = self._sequences[order.sequence_id]
        self._change(sequence, *samples)  # after a preemption the chunk contains tokens that the sequence has decoded
        return SequenceChunk(sequence, order.start, order.num_tokens, samples, order.scored)

    def clear(self) -> None:
        self._sequences.clear()
        self._kept.clear()
        self._decodes = DecodeBatch()
