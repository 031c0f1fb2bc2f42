"""An FFN worker process: computes the feed-forwards of the attention workers that are linked to it.

Links arrive on the inherited Unix socket, each to one attention worker. A thread serves each link, so no attention
worker waits for another one to have tokens. Nothing is kept between two micro-batches, so a worker can be replaced at
any point.
"""

from __future__ import annotations

import os
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch

from sageLLM.runtime.errors import SageError
from sageLLM.runtime.execution_graph.attention_ffn import with_peer
from sageLLM.runtime.executor.kernel_choice import reads_codes
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.planner import Runnable
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.loader.model import Model, load_model
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.worker.af_link import Link, LinkLostError, Watch, receive_offer
from sageLLM.runtime.worker.af_workers import Links, ReceivedRows
from sageLLM.runtime.worker.build import WorkerSpec, make_compiler
from sageLLM.runtime.worker.faults import LOG
from sageLLM.runtime.worker.process import Failed, Ready, Refused, Reply, end_with_parent


def run(spec: WorkerSpec, descriptor: int, parent: int) -> None:
    """Serves the links that arrive on the descriptor; ends the process."""
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    channel = socket.socket(fileno=descriptor)
    connection = Connection(os.dup(channel.fileno()))
    try:
        reply: Reply
        try:
            server = FfnServer(spec)
            reply = Ready()
        except SageError as error:
            reply = Refused(str(error))
        except Exception as error:
            reply = Failed(f"{type(error).__name__}: {error}")
        connection.send_bytes(msgspec.msgpack.encode(reply))
        if isinstance(reply, Ready):
            server.serve(channel)
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the engine has closed the socket
    finally:
        os._exit(0)  # threads may wait for attention workers


class FfnServer:
    """The feed-forwards of a model, and the links of the attention workers that use them."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Loads the weights of the feed-forwards. Raises what `load_model` raises."""
        assert spec.side is not None, "an FFN worker has a side"
        registry = load_registry(spec.plugins)
        self._links = Links({})
        device = torch.device(spec.device)
        self._model: Model = load_model(
            Path(spec.model),
            registry,
            dtype=spec.dtype,
            device=device,
            max_model_len=spec.max_model_len,
            rank=spec.side.share,
            tp=spec.side.width,
            role="ffn",
            expert_parallel=spec.enable_expert_parallel and spec.side.width > 1,
            keeps_codes=reads_codes(spec.kernels, device),
            activation_dtype=spec.activation_dtype,
        )
        self._compiler: ModelCompiler = make_compiler(
            self._model,
            registry,
            spec.kernels,
            spec.disable_passes,
            side=spec.side,
            overrides=self._links.kernels,
        )
        # Now and not in the first step, which waits for a worker that has been started again.
        most = -(-spec.num_ubatches // spec.num_ffn)
        graphs = [self._compiler.kernel_graph("prefill", number) for number in range(1, most + 1)]
        self._compiler.planner.prepare_weights(self._model.weights, self._model.ties, graphs)
        self._native = find_compiler() if device.type == "cpu" else None
        self._compiling = threading.Lock()
        self._threads: dict[int, threading.Thread] = {}

    def serve(self, channel: socket.socket) -> None:
        """Serves every link that arrives, until the channel is closed (EOFError)."""
        while True:
            offer, files = receive_offer(channel)
            # The kernels know a peer by its number, so the thread of an earlier link must have ended.
            if offer.peer in self._threads:
                self._links[offer.peer].shut_down()
                self._threads[offer.peer].join()
            link = Link(offer, files, self._native)
            self._links.add(link)
            thread = threading.Thread(target=self._serve_link, args=(link,), daemon=True, name="sagellm-ffn")
            self._threads[offer.peer] = thread
            thread.start()

    @torch.inference_mode()
    def _serve_link(self, link: Link) -> None:
        """Computes step after step, until the attention worker has closed the link."""
        watch = Watch([link])
        plans: dict[int, tuple[Runnable, ReceivedRows]] = {}
        try:
            while True:
                rows = link.receive_header()
                if len(rows) not in plans:
                    plans[len(rows)] = self._plan(link.peer, len(rows))
                plan, received = plans[len(rows)]
                plan.run(dict(received.inputs(rows)))
        except Exception as error:
            if not (watch.is_lost or isinstance(error, LinkLostError)):
                LOG.error("the link to attention worker %d is closed", link.peer, exc_info=error)
        finally:
            watch.close()
            link.close()

    def _plan(self, peer: int, num_ubatches: int) -> tuple[Runnable, ReceivedRows]:
        """The plan for steps of so many micro-batches; rows are rows, whatever the phase of their requests."""
        with self._compiling:
            graph = with_peer(self._compiler.kernel_graph("prefill", num_ubatches), peer)
            plan = self._compiler.plan(graph, self._model.bound_tensors())
        return plan, ReceivedRows(graph, self._model.device)
