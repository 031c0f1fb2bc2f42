"""Returns the tokens that the last pipeline stage samples to the first one, which embeds them in later steps.

The tokens do not go by the engine, so that it can submit the next step of a sequence before it has the result of the
last one. They are received when a step needs them; until then a sequence has a placeholder for its newest token.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from sageLLM.runtime.kernels.cpu.point_to_point import Link
from sageLLM.runtime.worker.sequences import NO_DECODES, DecodeBatch, WorkerSequence

NO_TOKEN = 0
"""The placeholder of a token that is not known on this rank."""
MAX_AWAITED = 64
"""The most steps with tokens that the first stage has not read, so that the last stage never waits to send more."""


class TokenChannel(Protocol):
    """Messages of token ids from the last to the first stage."""

    def send(self, token_ids: Sequence[int]) -> None:
        """Must not wait for the receiver, which may wait for this rank."""

    def receive(self, count: int) -> list[int]: ...


class SharedMemoryTokens:
    """Token ids over the link of two ranks of one host."""

    def __init__(self, peer: int) -> None:
        self._link = Link("pp", peer)

    def send(self, token_ids: Sequence[int]) -> None:
        self._link.send(np.array(token_ids, np.int32))

    def receive(self, count: int) -> list[int]:
        found = np.empty(count, np.int32)
        self._link.receive(found)
        ids: list[int] = found.tolist()
        return ids


class TorchTokens:
    """Token ids over a gloo group of the stages."""

    def __init__(self, group: "dist.ProcessGroup", peer: int) -> None:
        self._group, self._peer = group, peer
        self._sent: deque[tuple[dist.Work | None, torch.Tensor]] = deque()

    def send(self, token_ids: Sequence[int]) -> None:
        while self._sent and (self._sent[0][0] is None or self._sent[0][0].is_completed()):
            self._sent.popleft()
        tensor = torch.tensor(token_ids, dtype=torch.int32)
        self._sent.append((dist.isend(tensor, group=self._group, group_dst=self._peer), tensor))

    def receive(self, count: int) -> list[int]:
        tensor = torch.empty(count, dtype=torch.int32)
        dist.recv(tensor, group=self._group, group_src=self._peer)
        ids: list[int] = tensor.tolist()
        return ids


class AwaitedTokens:
    """The tokens of a run: of a batch of decodes alone, or of sequences with a placeholder at an index each."""

    def __init__(self, sampled: Sequence[WorkerSequence], indices: list[int] | None = None) -> None:
        self.sampled, self.indices = sampled, indices
        self.members = sampled.members if isinstance(sampled, DecodeBatch) else frozenset(map(id, sampled))


class TokenReturn:
    """The tokens of one stage, for all its workers: the runs of every stage are in the same order."""

    def __init__(self, channel: TokenChannel | None, *, is_first_stage: bool) -> None:
        """`channel` connects the first and the last stage; the others have none."""
        self._is_first_stage = is_first_stage
        self._channel = channel
        self._awaited: deque[AwaitedTokens] = deque()

    def send(self, token_ids: Sequence[int]) -> None:
        """Sends the tokens of a run, on the last stage."""
        if token_ids and self._channel is not None:
            self._channel.send(token_ids)

    def expect(self, sampled: Sequence[WorkerSequence]) -> None:
        """Appends placeholders for the tokens of a run, on the other stages; decodes alone get the tokens later."""
        if not sampled:
            return
        if not self._is_first_stage:
            append_placeholders(sampled)
        elif isinstance(sampled, DecodeBatch):
            self._awaited.append(AwaitedTokens(sampled))
        else:
            append_placeholders(sampled)
            self._awaited.append(AwaitedTokens(sampled, [len(one.output_token_ids) - 1 for one in sampled]))
        while len(self._awaited) > MAX_AWAITED:
            self._receive()

    def receive_for(self, decodes: DecodeBatch, others: Sequence[WorkerSequence]) -> None:
        """Waits until all tokens of these sequences are known, on the first stage."""
        if not self._awaited:
            return
        needed = decodes.members.union(map(id, others)) if others else decodes.members
        for count in range(len(self._awaited), 0, -1):
            if not self._awaited[count - 1].members.isdisjoint(needed):
                for _ in range(count):
                    self._receive(decodes)
                return

    def _receive(self, decodes: DecodeBatch = NO_DECODES) -> None:
        assert self._channel is not None, "the first stage has a channel"
        awaited = self._awaited.popleft()
        token_ids = self._channel.receive(len(awaited.sampled))
        if awaited.indices is None:
            assert isinstance(awaited.sampled, DecodeBatch), "only runs of decodes alone lack placeholders"
            awaited.sampled.append(token_ids)
            if awaited.sampled is not decodes:  # it may not be the batch of its sequences any more
                awaited.sampled.settle()
            return
        for sequence, index, token_id in zip(awaited.sampled, awaited.indices, token_ids, strict=True):
            sequence.output_token_ids[index] = token_id


def append_placeholders(sampled: Sequence[WorkerSequence]) -> None:
    """Appends a placeholder to each sequence, so that its length is right."""
    if isinstance(sampled, DecodeBatch):
        sampled.append([NO_TOKEN] * len(sampled))
        return
    for sequence in sampled:
        sequence.output_token_ids.append(NO_TOKEN)
