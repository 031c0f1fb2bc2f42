"""Turns the scheduler's plans into orders for one worker, with what the worker does not know yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sageLLM.runtime.engine.sequences import Sequence as Answer
from sageLLM.runtime.scheduler.base import Batch, Chunk, ScheduleOutput
from sageLLM.runtime.scheduler.batch import DecodeStepBatch
from sageLLM.runtime.scheduler.pd_scheduler import PDScheduler
from sageLLM.runtime.worker.orders import ChunkOrder, NewSequence, StepOrder, TableUpdate


@dataclass(frozen=True, slots=True)
class OrderedStep:
    """An order, and the sequence of each row of its result; `parents` has the parent's id of each fork by row.

    `chunked` are the sequences of the chunks.
    """

    order: StepOrder
    sampled: list[Answer]
    parents: dict[int, str] = field(default_factory=dict)
    chunked: list[Answer] = field(default_factory=list)

    @property
    def computed(self) -> list[Answer]:
        """All sequences of the order."""
        return list({id(sequence): sequence for sequence in (*self.sampled, *self.chunked)}.values())


class OrderBuilder:
    """Builds the orders of one worker. `sequences` are the engine's live ones, by request id."""

    def __init__(self, sequences: Mapping[str, Answer], scheduler: PDScheduler) -> None:
        self._sequences = sequences
        self._scheduler = scheduler
        self._num_blocks_sent: dict[str, int] = {}
        self._dropped: list[str] = []
        self._offsets: list[int] | None = None
        self._decodes: list[Answer] = []

    def forget(self, request_id: str) -> None:
        """Lets the next order drop a sequence that the worker may have."""
        if self._num_blocks_sent.pop(request_id, None) is not None:
            self._dropped.append(request_id)

    def send_again(self, request_id: str) -> None:
        """The sequence has other blocks than before; the next order with it sends its whole table."""
        if request_id in self._num_blocks_sent:
            self._num_blocks_sent[request_id] = 0
            self._offsets = None  # the worker fills the rows of the decodes again

    def build(
        self, plan: ScheduleOutput, decodes: Batch | None, chunks: Sequence[Chunk], *, has_tiers: bool
    ) -> OrderedStep:
        """The order for these decodes and chunks of a plan. Block copies are for the worker that `has_tiers`."""
        new: list[NewSequence] = []
        tables: list[TableUpdate] = []
        names: list[str] | None = None
        sampled: list[Answer] = []
        if decodes is not None:
            assert isinstance(decodes, DecodeStepBatch), "the scheduler plans decodes as one DecodeStepBatch"
            # The scheduler keeps one list of offsets while the same requests decode, so its identity is the test.
            if decodes.offsets is not self._offsets:
                self._offsets = decodes.offsets
                names = [request.request_id for request in decodes.requests]
                self._decodes = [self._sequences[name] for name in names]
                for sequence in self._decodes:
                    self._announce(sequence, new, tables)
            else:
                for request_id in plan.kv_blocks_to_allocate.keys() & self._num_blocks_sent.keys():
                    self._announce(self._sequences[request_id], new, tables)
            sampled = self._decodes
        orders: list[ChunkOrder] = []
        parents: dict[int, str] = {}
        if chunks:
            sampled = list(sampled)
            for chunk in chunks:
                orders.append(self._chunk(chunk, new, tables, sampled, parents))
        order = StepOrder(
            dropped=self._dropped,
            new=new,
            tables=tables,
            block_copies=plan.block_copies if has_tiers else [],
            tier_copies=plan.tier_copies if has_tiers else [],
            has_decodes=decodes is not None,
            decodes=names,
            chunks=orders,
        )
        self._dropped = []
        chunked = [self._sequences[chunk.request.request_id] for chunk in chunks]
        return OrderedStep(order, sampled, parents, chunked)

    def _chunk(
        self,
        chunk: Chunk,
        new: list[NewSequence],
        tables: list[TableUpdate],
        sampled: list[Answer],
        parents: dict[int, str],
    ) -> ChunkOrder:
        request_id = chunk.request.request_id
        sequence = self._sequences[request_id]
        self._announce(sequence, new, tables)
        samples = []
        if chunk.is_last:
            samples.append(request_id)
            sampled.append(sequence)
            for request in self._scheduler.forks_of(request_id):
                fork = self._sequences[request.request_id]
                self._announce(fork, new, tables)
                samples.append(request.request_id)
                parents[len(sampled)] = request_id
                sampled.append(fork)
        scored = sequence.group.rows_to_score(chunk)
        return ChunkOrder(request_id, chunk.start, chunk.num_tokens, samples, scored)

    def _announce(self, sequence: Answer, new: list[NewSequence], tables: list[TableUpdate]) -> None:
        """Sends the sequence if the worker does not have it, and the blocks that it does not have."""
        request = sequence.request
        num_sent = self._num_blocks_sent.get(request.request_id)
        if num_sent is None:
            new.append(sequence.as_order())
            num_sent = 0
        blocks = request.kv_block_ids
        if len(blocks) > num_sent:
            tables.append(TableUpdate(request.request_id, num_sent, blocks[num_sent:]))
        self._num_blocks_sent[request.request_id] = len(blocks)
