"""Measures the ping-pong of attention-FFN disaggregation with injected delays, against its closed form.

    python benchmarks/af.py [--ta 20] [--te 20] [--tc 9] [--rounds 5]

Two processes run the two sides of a decode step of the tiny model, as an attention worker and an FFN worker do, in 1 to
4 micro-batches over a socket. The attention of a layer and a micro-batch is stretched to `ta` milliseconds, the FFN to
`te`, and a message arrives `tc` after it was sent. So the time of a step depends on the order of the two sides alone:

    T(m) = (L - 1) max(m Tf, Ta + Te + 2 Tc) + (Ta + Te + 2 Tc) + (m - 1) Tf, with Tf = max(Ta, Te)

The last column is the estimate of the block graph that the pass `af_disaggregation` returns, with the same times.
"""

import argparse
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sageLLM.generated.hardware import HARDWARE
from sageLLM.generated.passes.place import AfDisaggregation
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.kernels import Kernel
from sageLLM.runtime.execution_graph.attention_ffn import Role, Side
from sageLLM.runtime.execution_graph.batch import DecodeBatch as BoundBatch
from sageLLM.runtime.execution_graph.builder import ExecutionGraphBuilder, ModelConfig
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.loader.model import Model, load_model
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.worker.af_link import Link, LinkLostError, LinkOffer
from sageLLM.runtime.worker.af_workers import ReceivedRows
from sageLLM.runtime.worker.kv_pool import KVPool
from sageLLM.runtime.worker.micro_batch_inputs import MicroBatchInputs, ranges
from sageLLM.runtime.worker.sequences import DecodeBatch, WorkerSequence
from sageLLM.runtime.worker.step_inputs import StepInputs

MODEL = Path(__file__).parents[1] / "examples" / "tiny_python_model"
NUM_SEQUENCES, BLOCK_SIZE = 16, 16
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ta", type=float, default=20.0, help="milliseconds of attention per layer and micro-batch")
    parser.add_argument("--te", type=float, default=20.0, help="milliseconds of the FFN")
    parser.add_argument("--tc", type=float, default=9.0, help="milliseconds of a message in one direction")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ffn", type=int, help="used by the program itself")
    options = parser.parse_args()
    times = options.ta / 1e3, options.te / 1e3, options.tc / 1e3
    torch.set_num_threads(1)
    if options.ffn is not None:
        serve(options.ffn, times[1], times[2])
        return
    print(f"Ta {options.ta} ms, Te {options.te} ms, Tc {options.tc} ms, {options.rounds} rounds")
    print(f"{'m':>2} {'measured':>10} {'T(m)':>10} {'error':>8} {'graph':>10} {'busy':>6}")
    for parts in range(1, 5):
        model = tiny_model("attention")
        found = statistics.median(measure(model, parts, times, options.rounds))
        expected = closed_form(model.config.L, parts, *times)
        busy = model.config.L * parts * max(times[:2]) / found
        estimate = estimated(model, parts, times)
        print(
            f"{parts:>2} {1e3 * found:>8.1f}ms {1e3 * expected:>8.1f}ms {found / expected - 1:>+8.1%} "
            f"{1e3 * estimate:>8.1f}ms {busy:>6.1%}",
            flush=True,
        )


def closed_form(layers: int, parts: int, ta: float, te: float, tc: float) -> float:
    slower, round_trip = max(ta, te), ta + te + 2 * tc
    return (layers - 1) * max(parts * slower, round_trip) + round_trip + (parts - 1) * slower


class DelayedLink:
    """A link that stretches the time between two messages, and delivers them later.

    `busy` is the time from a message that arrives, or from the one sent before, to the next one that is sent.
    """

    def __init__(self, link: Link, busy: float, transfer: float) -> None:
        self.link, self._busy, self._transfer = link, busy, transfer
        self.started = 0.0

    @property
    def kernels(self) -> dict[str, Kernel]:
        return {"send": self._send, "recv": self._receive}

    def _send(self, x: Tensor, *, peer: int, group: str) -> Tensor:
        _sleep_until(self.started + self._busy)
        self.started = time.monotonic()
        self.link.send(torch.tensor([[self.started]], dtype=torch.float64))
        self.link.send(x)
        return x

    def _receive(self, buffer: Tensor, *, peer: int, group: str) -> Tensor:
        sent = torch.zeros(1, 1, dtype=torch.float64)
        self.link.receive(sent)
        self.link.receive(buffer)
        _sleep_until(sent.item() + self._transfer)  # the clock is that of all processes
        self.started = time.monotonic()
        return buffer


def _sleep_until(moment: float) -> None:
    if (rest := moment - time.monotonic()) > 0:
        time.sleep(rest)


def tiny_model(role: Role) -> Model:
    options: dict[str, Any] = {"dtype": "float32", "device": CPU, "max_model_len": 128, "role": role}
    return load_model(MODEL, load_registry(), **options)


def compiler_of(model: Model, role: Role) -> ModelCompiler:
    registry = load_registry()
    return ModelCompiler(model.layout, model.config, registry, dtype="f32", side=Side(role, 0, 1))


@torch.inference_mode()
def measure(model: Model, parts: int, times: tuple[float, float, float], rounds: int) -> list[float]:
    """Seconds of decode steps; the time after the last message is not part of the pipeline."""
    ta, te, tc = times
    ours, theirs = socket.socketpair()
    arguments = ["--ffn", str(theirs.fileno()), "--te", str(1e3 * te), "--tc", str(1e3 * tc)]
    ffn = subprocess.Popen([sys.executable, __file__, *arguments], pass_fds=[theirs.fileno()])
    theirs.close()
    delayed = DelayedLink(Link(LinkOffer(0, 0, 0), [ours.detach()], None), ta, tc)
    registry, compiler = load_registry(), compiler_of(model, "attention")
    pool = KVPool(model.config.L, 64, BLOCK_SIZE, model.layout.cache(model.config), model.dtype, CPU)
    bound: dict[str, Any] = {**model.bound_tensors(), **pool.named_tensors()}
    graph = compiler.kernel_graph("decode", parts)
    plan = Plan(graph, {**registry.kernels, **delayed.kernels}, bound)
    sequences = [WorkerSequence(str(i), [5, 6, 7 + i], block_ids=[i]) for i in range(NUM_SEQUENCES)]
    whole = StepInputs(BLOCK_SIZE, 8, model.tables)
    inputs = whole.make(DecodeBatch(sequences), [], list(range(NUM_SEQUENCES)))
    if parts > 1:
        inputs = MicroBatchInputs(parts).divide(inputs, NUM_SEQUENCES, [])
    rows = [end - first for first, end in ranges(NUM_SEQUENCES, parts)]
    inputs = {**inputs, **ReceivedRows(graph, CPU).inputs(rows)}
    found = []
    for _ in range(rounds + 1):
        delayed.link.send_header(rows)
        delayed.started = start = time.monotonic()
        plan.run(inputs)
        found.append(delayed.started - start)  # `started` is when the last message has arrived
    delayed.link.close()
    ffn.wait()
    return found[1:]


@torch.inference_mode()
def serve(file: int, te: float, tc: float) -> None:
    """The FFN's process: step after step, until the link is closed."""
    model = tiny_model("ffn")
    registry, compiler = load_registry(), compiler_of(model, "ffn")
    delayed = DelayedLink(Link(LinkOffer(0, 1, 0), [file], None), te, tc)
    plans: dict[int, tuple[Plan, ReceivedRows]] = {}
    try:
        while True:
            rows = delayed.link.receive_header()
            if len(rows) not in plans:
                graph = compiler.kernel_graph("decode", len(rows))
                plan = Plan(graph, {**registry.kernels, **delayed.kernels}, model.bound_tensors())  # type: ignore[dict-item]
                plans[len(rows)] = plan, ReceivedRows(graph, CPU)
            plan, received = plans[len(rows)]
            plan.run(received.inputs(rows))
    except LinkLostError:
        pass


def estimated(model: Model, parts: int, times: tuple[float, float, float]) -> float:
    """Seconds of the step by the block graph of the pass."""
    ta, te, tc = (1e6 * one for one in times)
    c = model.config
    builder = ExecutionGraphBuilder(ModelConfig(c.L, c.H, c.Nq, c.Nkv, c.I, c.V, 128), hardware=HARDWARE["cpu"])
    names = [str(i) for i in range(NUM_SEQUENCES)]
    graph = builder.build_decode_graph(BoundBatch(names, [4] * NUM_SEQUENCES, NUM_SEQUENCES))

    def part_time(node: ExecutionNode, num_rows: int) -> float:
        return {"DECODE_ATTN": ta, "FFN": te, "COMM_SEND": tc}.get(node.op_type.name, 0.0)

    for node in graph.nodes.values():  # those that are not split keep their times
        node.estimated_time_us = part_time(node, NUM_SEQUENCES)
    return AfDisaggregation(parts, part_time=part_time).apply(graph).estimate_total_time() / 1e6


if __name__ == "__main__":
    main()
