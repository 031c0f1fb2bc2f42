"""Batches of decodes that take turns, as between pipeline stages: kept rows and late tokens equal plain ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

import pytest
import torch

from sageLLM import SamplingParams
from sageLLM.runtime.loader.model import load_model
from sageLLM.runtime.loader.tables import PositionTables
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.worker.orders import ChunkOrder, NewSequence, StepOrder, TableUpdate
from sageLLM.runtime.worker.recent import Recent
from sageLLM.runtime.worker.sequences import DecodeBatch, SequenceTable, WorkerSequence
from sageLLM.runtime.worker.token_return import TokenReturn

from .test_step_inputs import BLOCK_SIZE, MODEL, Checked

MAX_LEN = 96
PARAMS = SamplingParams(max_tokens=MAX_LEN, temperature=0.0)


class Traffic:
    """Random orders for one worker: two groups of sequences decode in turns; some join, leave, or change their blocks.

    `tokens` are those that each sequence must have.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.tokens: dict[str, list[int]] = {}
        self.groups: list[list[str]] = [[], []]
        self.sent: dict[str, list[int]] = {}
        self.dropped: list[str] = []
        self.num_named = 0
        self.last: list[str] | None = None
        self.free = iter(range(100_000))

    def order(self, turn: int) -> tuple[StepOrder, list[str]]:
        """The order of a step, and the sequences that get a token."""
        group, random = self.groups[turn % 2], self.random
        if group and random.random() < 0.15:
            self.leave(group.pop(random.randrange(len(group))))
        if group and random.random() < 0.1:  # swapped out and in again, to other blocks
            self.sent[random.choice(group)] = []
            self.last = None
        if len(self.groups[0]) > 1 and random.random() < 0.1:
            self.groups[1].append(self.groups[0].pop())
        for name in [name for name in group if len(self.tokens[name]) >= MAX_LEN - 1]:
            group.remove(name)
            self.leave(name)
        new: list[NewSequence] = []
        tables: list[TableUpdate] = []
        chunks: list[ChunkOrder] = []
        joined: list[str] = []
        decodes = list(group)
        if group and random.random() < 0.05:  # forgotten, and sent again with its tokens
            name = random.choice(group)
            self.dropped.append(name)
            new.append(NewSequence(name, list(self.tokens[name]), [], PARAMS, 0))
            self.sent[name], self.last = [], None
        if not group or random.random() < 0.3:
            name = f"s{self.num_named}"
            self.num_named += 1
            prompt = [random.randrange(100) for _ in range(random.randrange(1, 20))]
            new.append(NewSequence(name, list(prompt), [], PARAMS, 0))
            self.tokens[name], self.sent[name] = prompt, []
            chunks.append(ChunkOrder(name, 0, len(prompt), [name]))
            joined.append(name)
            group.append(name)
        for name in (*decodes, *joined):
            needed = -(-len(self.tokens[name]) // BLOCK_SIZE)
            first = len(self.sent[name])
            if needed > first:
                blocks = [next(self.free) for _ in range(needed - first)]
                self.sent[name] += blocks
                tables.append(TableUpdate(name, first, blocks))
        names = None if decodes == self.last else decodes
        self.last = decodes or self.last
        dropped, self.dropped = self.dropped, []
        order = StepOrder(
            dropped=dropped,
            new=new,
            tables=tables,
            chunks=chunks,
            has_decodes=bool(decodes),
            decodes=names if decodes else None,
        )
        return order, [*decodes, *joined]

    def leave(self, name: str) -> None:
        self.dropped.append(name)
        self.last = None
        del self.tokens[name], self.sent[name]


class Channel:
    """Tokens of the last stage, in order."""

    def __init__(self) -> None:
        self.sent: deque[list[int]] = deque()

    def send(self, token_ids: Sequence[int]) -> None:
        self.sent.append(list(token_ids))

    def receive(self, count: int) -> list[int]:
        token_ids = self.sent.popleft()
        assert len(token_ids) == count
        return token_ids


def tokens_of(sequence: WorkerSequence) -> list[int]:
    return [*sequence.prompt_token_ids, *sequence.output_token_ids]


@pytest.fixture(scope="module")
def tables() -> PositionTables:
    options = {"dtype": "float32", "device": torch.device("cpu"), "max_model_len": MAX_LEN}
    return load_model(MODEL, load_registry(), has_weights=False, **options).tables


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("is_first_stage", [True, False])
def test_batches_in_turns(seed: int, is_first_stage: bool, tables: PositionTables) -> None:
    """On the first stage tokens come back one step late; on the last one they are appended at once."""
    traffic, table, channel = Traffic(Random(seed)), SequenceTable(2), Channel()
    inputs = Checked(BLOCK_SIZE, MAX_LEN // BLOCK_SIZE, tables, num_batches=2)
    tokens = TokenReturn(channel, is_first_stage=True)
    num_kept, seen = 0, Recent[DecodeBatch, bool](2)
    for step in range(120):
        order, names = traffic.order(step)
        table.update(order)
        decodes, chunks = table.decodes(order), [table.chunk(chunk) for chunk in order.chunks]
        if is_first_stage:
            tokens.receive_for(decodes, [chunk.sequence for chunk in chunks])
        num_kept += bool(decodes) and seen.get(decodes) is not None
        seen.put(decodes, True)
        rows = list(range(len(names)))
        inputs.make(decodes, chunks, rows)
        sampled: Sequence[WorkerSequence] = decodes
        if chunks:
            sampled = [*decodes, *(one for chunk in chunks for one in chunk.samples)]
        for name, sequence in zip(names, sampled, strict=True):
            assert tokens_of(sequence) == traffic.tokens[name]
        token_ids = [traffic.random.randrange(100) for _ in names]
        for name, token_id in zip(names, token_ids, strict=True):
            traffic.tokens[name].append(token_id)
        if is_first_stage:
            tokens.expect(sampled)
            channel.send(token_ids)
        elif isinstance(sampled, DecodeBatch):
            sampled.append(token_ids)
        else:
            for sequence, token_id in zip(sampled, token_ids, strict=True):
                sequence.output_token_ids.append(token_id)
    assert num_kept > 10
