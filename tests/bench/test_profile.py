"""The profile of an engine's steps: all calls are counted, work is that of the formulas, and answers do not change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sageLLM import LLM, SamplingParams
from sageLLM.generated import ops
from sageLLM.generated.hardware import HARDWARE
from sageLLM.runtime.bench.profile import StepProfile, profiled, step_work
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.core.cost import Link
from sageLLM.runtime.core.ir.graph import ExecutionGraph
from sageLLM.runtime.core.ir.writer import GraphWriter
from sageLLM.runtime.errors import SageError
from sageLLM.runtime.executor.native.call_times import CallTime
from sageLLM.runtime.executor.native.recorder import RecordedStep
from sageLLM.runtime.kernels.cpu.compiler import find_compiler

MODEL = Path(__file__).parents[2] / "examples" / "tiny_python_model"
CPU = HARDWARE["cpu"]
NUM_TOKENS, NUM_NEW = 9, 4
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="requires a C++ compiler")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    made = LLM(MODEL, dtype="float32", enable_prefix_caching=False)
    yield made
    made.close()


@needs_compiler
def test_all_calls_are_counted_and_answers_are_the_same(llm: LLM) -> None:
    prompts, params = (
        [list(range(1, NUM_TOKENS + 1))],
        SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True),
    )
    (plain,) = llm.generate(prompts, params)
    with profiled(llm, CPU) as profile:
        (timed,) = llm.generate(prompts, params)
    assert timed.outputs[0].token_ids == plain.outputs[0].token_ids
    assert {name: stage.steps for name, stage in profile.stages.items()} == {"prefill": 1, "decode": NUM_NEW - 1}
    native = {one.graph.rpartition("_")[2]: one.num_native for one in llm.kernel_stats()}
    for name, stage in profile.stages.items():
        assert sum(total.calls for total in stage.ops.values()) == stage.steps * native[name]
        assert all(total.seconds > 0 for total in stage.ops.values())
        assert sum(total.seconds for total in stage.ops.values()) <= stage.seconds
    config = llm.model.config
    gemms = [name for name in profile.stages["prefill"].ops if name.startswith("linear")]
    weights = config.L * (config.H * (config.Nq + 2 * config.Nkv) * config.D + config.Nq * config.D * config.H)
    weights += config.L * 3 * config.H * config.I
    flops = sum(profile.stages["prefill"].ops[name].flops for name in gemms)
    assert flops == pytest.approx(2 * NUM_TOKENS * weights, rel=0.05), "the last layer computes fewer rows at its end"
    llm.generate(prompts, params)
    assert profile.stages["prefill"].steps == 1, "nothing is recorded after the context"
    table = profile.table().splitlines()
    assert table[0].startswith("limits of cpu: 40.0 GB/s, ")
    assert [line.split(":")[0] for line in table if " steps of " in line] == ["prefill", "decode"]
    assert sum(line.startswith("all ") for line in table) == 2


@needs_compiler
def test_the_command_prints_the_profile_to_stderr() -> None:
    command = ["run", str(MODEL), "--prompt", "def main(", "--max-tokens", "3", "--profile"]
    done = CliRunner().invoke(app, [*command, "--hardware", "cpu"])
    assert done.exit_code == 0 and done.stdout.startswith("def main(")
    assert "limits of cpu" in done.stderr and "lm_head_sample" in done.stderr
    done = CliRunner().invoke(app, [*command, "--hardware", "abacus"])
    assert done.exit_code == 1 and "abacus" in done.stderr


def test_sizes_follow_from_the_lengths_of_the_sequences() -> None:
    """Two decodes and a chunk of 3 tokens after 4, also as the only micro-batch."""
    lengths, starts = torch.tensor([5, 9, 7]), torch.tensor([0, 1, 2, 5])
    graph = ExecutionGraph("sizes", model_config=SimpleNamespace(X=8, A=2))
    expected = {"Td": 2, "Tp": 3, "KV": 21, "KVd": 14, "LL": 25 + 81 + 49, "QK": 5 + 9 + 3 * 4 + 6, "EX": 8}
    assert step_work(graph, {"seq_lens": lengths, "q_start": starts}) == expected
    parts = {"seq_lens.p0": lengths, "q_start.p0": starts}
    assert step_work(graph, parts) == {f"{name}0": expected[name] for name in ("Td", "Tp", "KV", "KVd")}


def test_the_hidden_part_of_a_stream() -> None:
    """Stream 1 runs 4 of its 10 us next to stream 0."""

    def call(stream: int, begin: int, end: int) -> CallTime:
        return CallTime(f"n{begin}", "copy", stream, 1000 * begin, 1000 * end, 0, 0)

    profile = StepProfile(CPU)
    times = [call(0, 0, 6), call(1, 4, 10), call(0, 8, 9), call(1, 12, 16), call(0, 15, 17)]
    profile.add(RecordedStep(ExecutionGraph("io", stage="decode"), {}, {}, times))
    stage = profile.stages["decode"]
    assert (stage.side_s[1], stage.hidden_s[1]) == (pytest.approx(10e-6), pytest.approx(4e-6))
    assert profile.table().splitlines()[-1] == "stream 1: 0.01 ms, 40% hidden by computation"


def test_the_limit_of_a_transfer_is_that_of_its_link() -> None:
    """1 KiB in and out take 1.024 us at 1 GB/s, so 4 us are a quarter of the limit; another op has that of memory."""
    g = GraphWriter("io", level="kernel", stage="decode", dtype="f32")
    x = g.input("x", "f32", 256)
    loaded = ops.scale(g, x, factor=1.0)
    graph = g.finish([ops.silu(g, loaded)])
    graph.nodes[loaded.name].metadata["tier"] = "disk"
    profile = StepProfile(replace(CPU, disk_link=Link(1e9, 0.0)))
    times = [CallTime(node.node_id, node.op, 0, 0, 4096, 0, 1) for node in graph.nodes.values()]
    profile.add(RecordedStep(graph, {}, {}, times))
    found = profile.stages["decode"].ops
    assert found["scale"].memory_s == pytest.approx(1.024e-6)
    assert found["silu"].memory_s == pytest.approx(2048 / CPU.memory_bandwidth)
    assert found["scale"].row("scale", 1.0)[-2:] == ("25%", "memory")


@pytest.mark.parametrize(("runs_in_processes", "message"), [(True, "requires the model in this process"),
                                                            (False, "requires the kernels 'cpu'")])  # fmt: skip
def test_engines_that_cannot_be_profiled(runs_in_processes: bool, message: str) -> None:
    planner = SimpleNamespace(name="reference")
    engine: Any = SimpleNamespace(compiler=SimpleNamespace(planner=planner), runs_in_processes=runs_in_processes)
    with pytest.raises(SageError, match=message), profiled(engine, CPU):
        pass
