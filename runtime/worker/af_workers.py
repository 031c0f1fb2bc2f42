"""The attention worker's end of attention-FFN disaggregation: its links, and steps that survive the loss of an FFN.

An attention worker keeps the KV, and FFN workers keep nothing between two micro-batches. So a step that has lost an FFN
worker runs again, from the beginning: it writes the same keys and values to the same slots.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

import torch
from torch import Tensor

from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.execution_graph.attention_ffn import ReceiveBuffer, Side, receive_buffers
from sageLLM.runtime.executor.native.calls import number_of
from sageLLM.runtime.kernels.cpu.callables import TORCH_DTYPES
from sageLLM.runtime.kernels.cpu.compiler import Compiler
from sageLLM.runtime.worker.af_link import Link, LinkLostError, Watch, receive_offer
from sageLLM.runtime.worker.faults import LOG

MAX_REPLAYS = 5
"""The number of times a step runs again; a step that FFN workers do not survive may be the cause."""


class Links:
    """The links of a process, by peer. Their `kernels` replace the ops `send` and `recv` where there are no rings."""

    def __init__(self, links: Mapping[int, Link]) -> None:
        self._links = dict(links)

    def __getitem__(self, peer: int) -> Link:
        return self._links[peer]

    def add(self, link: Link) -> None:
        self._links[link.peer] = link

    @property
    def kernels(self) -> dict[str, Kernel]:
        return {"send": self._send, "recv": self._receive}

    def _send(self, x: Tensor, *, peer: int, group: str) -> Tensor:
        self._links[peer].send(x)
        return x

    def _receive(self, buffer: Tensor, *, peer: int, group: str) -> Tensor:
        self._links[peer].receive(buffer)
        return buffer


class AttentionLinks(Links):
    """The links of an attention worker to all FFN workers, which the engine's process makes on request."""

    def __init__(self, channel: socket.socket, side: Side, compiler: Compiler | None) -> None:
        super().__init__({})
        self._channel, self.side, self._compiler = channel, side, compiler
        self.num_replays = 0
        self._connect()

    def begin_step(self, rows: list[int]) -> None:
        """Announces the rows of the micro-batches to the FFN workers that get some."""
        for peer in range(self.side.num_peers):
            own = [count for part, count in enumerate(rows) if peer in self.side.peers(part, len(rows))]
            if own:
                self._links[peer].send_header(own)

    def is_loss(self, error: Exception) -> bool:
        """Whether a step has failed because an FFN worker is gone."""
        return isinstance(error, LinkLostError) or self._watch.is_lost

    def renew(self) -> None:
        """Replaces all links, as the other FFN workers are in the middle of the step.

        Waits for lost workers to be started again. If they do not start, this process ends: its requests are lost, and
        no other error of the step would tell that to the engine.
        """
        self.close()
        try:
            self._connect()
        except (OSError, EOFError) as error:
            LOG.error("no FFN worker is left: %s", error)
            raise SystemExit(1) from error

    def close(self) -> None:
        self._watch.close()
        for link in self._links.values():
            link.close()

    def _connect(self) -> None:
        self._channel.sendall(b"?")
        self._links.clear()
        for _ in range(self.side.num_peers):
            offer, files = receive_offer(self._channel)
            self._links[offer.peer] = Link(offer, files, self._compiler)
        self._watch = Watch(self._links.values())


class ReceivedRows:
    """Memory for the rows that a graph receives from each peer. The layers share it, as they run in order."""

    def __init__(self, graph: ExecutionGraph, device: torch.device) -> None:
        self._refs = receive_buffers(graph)
        self._device = device
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._views: tuple[list[int], dict[str, Tensor]] = ([], {})

    def inputs(self, rows: list[int]) -> dict[str, Tensor]:
        """The buffers by the names of the graph's inputs, for micro-batches of these numbers of rows."""
        if rows != self._views[0]:
            self._views = list(rows), {one.ref.name: self._buffer(one, rows[one.part]) for one in self._refs}
        return self._views[1]

    def _buffer(self, one: ReceiveBuffer, num_rows: int) -> Tensor:
        ref, key = one.ref, (one.part, one.peer)
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < num_rows:
            size = num_rows if buffer is None else max(num_rows, 2 * len(buffer))
            width = number_of(ref.shape[1], {})
            buffer = self._buffers[key] = torch.empty(size, width, dtype=TORCH_DTYPES[ref.dtype], device=self._device)
        return buffer[:num_rows]
