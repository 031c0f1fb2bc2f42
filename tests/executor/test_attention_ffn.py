"""The two sides of disaggregated graphs, which exchange rows between two threads, compared with whole graphs."""

import socket
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from sageLLM.generated.builders import MODELS
from sageLLM.generated.ops import Recv, Send
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.verify import verify
from sageLLM.runtime.core.model.hf_config import HFConfig
from sageLLM.runtime.execution_graph.attention_ffn import Side, is_ffn_weight, part_of
from sageLLM.runtime.executor.model_compiler import ModelCompiler
from sageLLM.runtime.executor.torch_plan import Plan
from sageLLM.runtime.registry.plugins import load_registry
from sageLLM.runtime.worker.af_link import Link, LinkLostError, LinkOffer
from sageLLM.runtime.worker.af_workers import Links, ReceivedRows

from .test_micro_batches import KERNELS, LAYOUTS, run

REGISTRY = load_registry()


def compiler_of(layout: Any, config: Any, role: Any) -> ModelCompiler:
    return ModelCompiler(layout, config, REGISTRY, dtype="f32", side=Side(role, 0, 1))


def linked() -> tuple[Links, Links]:
    """Both ends of a link over a socket, as the links of an attention worker and of an FFN worker."""
    ends = socket.socketpair()
    attention, ffn = (Links({0: Link(LinkOffer(0, side, 0), [end.detach()], None)}) for side, end in enumerate(ends))
    return attention, ffn


class Disaggregated:
    """A plan of the attention's side, with a thread that runs the FFN's side of each step."""

    def __init__(self, compilers: Mapping[str, ModelCompiler], graph: ExecutionGraph, bound: Any, parts: int) -> None:
        self.attention, self.ffn = linked()
        self.parts = parts
        stage = graph.stage
        assert stage is not None
        own, other = (compilers[role].kernel_graph(stage, parts) for role in ("attention", "ffn"))
        self.plan = Plan(own, {**KERNELS, **self.attention.kernels}, bound)
        self.received = ReceivedRows(own, torch.device("cpu"))
        self.ffn_plan = Plan(other, {**KERNELS, **self.ffn.kernels}, bound)
        self.ffn_received = ReceivedRows(other, torch.device("cpu"))

    def run(self, inputs: Any) -> Any:
        names = [f"pos.p{part}" for part in range(self.parts)] if self.parts > 1 else ["pos"]
        rows = [len(inputs[name]) for name in names]
        self.attention[0].send_header(rows)
        thread = threading.Thread(target=self._serve)
        thread.start()
        outputs = self.plan.run({**inputs, **self.received.inputs(rows)})
        thread.join()
        return outputs

    @torch.inference_mode()
    def _serve(self) -> None:
        self.ffn_plan.run(self.ffn_received.inputs(self.ffn[0].receive_header()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_sides_together_compute_the_same(name: str, make_tiny: Any) -> None:
    tiny = make_tiny(name, "f32")
    compilers = {role: compiler_of(tiny.layout, tiny.config, role) for role in ("attention", "ffn")}
    parts = LAYOUTS[name]
    with torch.inference_mode():
        reference = run(tiny, 1, lambda g, b: Plan(g, KERNELS, b))
        found = run(tiny, parts, lambda g, b: Disaggregated(compilers, g, b, parts))
    for step, expected in zip(found, reference, strict=True):
        for x, y in zip(step, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["prefill", "decode", "hybrid"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", ["llama", "falcon", "deepseek_v3"])
def test_the_sides_of_a_graph(name: str, parts: int, stage: Any) -> None:
    layout = MODELS[name]
    config = layout.read_config(HFConfig(layout.tiny, "tiny"))
    sides = {role: compiler_of(layout, config, role).kernel_graph(stage, parts) for role in ("attention", "ffn")}
    names = {spec.name for spec in layout.weights(config) if spec.tied_to is None}
    for role, graph in sides.items():
        verify(graph)
        assert {node.device_id for node in graph.nodes.values()} == {0}
        assert {node.stream_id for node in graph.nodes.values()} == {0}
        read = graph.weights.keys() & names
        assert read == {weight for weight in names if is_ffn_weight(layout, weight) == (role == "ffn")}
    sent, received = ([part_of(n) for n in g.nodes.values() if isinstance(n, Send)] for g in sides.values())
    assert sent == received == list(range(parts)) * config.L, "channels match by order"


@pytest.mark.parametrize("parts", [2, 3])
def test_micro_batches_alternate(parts: int) -> None:
    """A micro-batch is sent before the next one is computed, and the next one is computed before this one returns."""
    layout = MODELS["llama"]
    config = layout.read_config(HFConfig(layout.tiny, "tiny"))
    graph = compiler_of(layout, config, "attention").kernel_graph("decode", parts)
    transfers = [node for node in graph.nodes.values() if isinstance(node, Send | Recv)]
    first = [f"send{part}" for part in range(parts)]
    middle = [f"{op}{part}" for part in range(parts) for op in ("recv", "send")]
    last = [f"recv{part}" for part in range(parts)]
    assert [f"{node.op}{part_of(node)}" for node in transfers] == first + middle * (config.L - 1) + last
    order = list(graph.nodes)
    for part in range(parts - 1):
        sent = next(node.node_id for node in transfers if isinstance(node, Send) and part_of(node) == part)
        assert order.index(sent) < order.index(f"L0.attention.o.p{part + 1}")


@pytest.mark.parametrize(("num_attention", "num_ffn"), [(1, 1), (2, 1), (3, 2), (5, 3), (1, 4), (2, 3)])
@pytest.mark.parametrize("num_ubatches", [1, 2, 3, 4])
def test_micro_batches_are_divided_evenly(num_attention: int, num_ffn: int, num_ubatches: int) -> None:
    counts = [0] * num_ffn
    for rank in range(num_attention):
        for part in range(num_ubatches):
            counts[Side("attention", rank, num_ffn).peers(part, num_ubatches)[0]] += 1
    assert max(counts) - min(counts) <= 1


def test_a_closed_link_is_lost() -> None:
    attention, ffn = linked()
    ffn[0].close()
    with pytest.raises(LinkLostError, match="rank 0 has closed its link"):
        attention[0].receive(torch.empty(2, 3))
    attention[0].close()


def test_large_messages_in_both_directions_do_not_block_each_other() -> None:
    attention, ffn = linked()
    rows = [torch.full((512, 1024), float(i)) for i in range(4)]
    for x in rows:
        attention[0].send(x)
        ffn[0].send(x)
    for x in rows:
        for end in (attention, ffn):
            buffer = torch.empty_like(x)
            end[0].receive(buffer)
            assert torch.equal(buffer, x)
    attention[0].close()
    ffn[0].close()
