"""Tests of `sagellm bench hardware`: loops, sweep, fit and entry, in short runs; the figures themselves mean little."""

import ctypes
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sageLLM.generated.kernels import cpu
from sageLLM.runtime.bench import hardware, limits, sweep
from sageLLM.runtime.bench.hardware import HardwareRequest, as_yaml, measure_hardware
from sageLLM.runtime.bench.limits import LOOPS, LimitKernels, disk_read_rate
from sageLLM.runtime.bench.rank import RankResult, RankSpec, measure_rank
from sageLLM.runtime.bench.sweep import SweepModel, decodes, prompt
from sageLLM.runtime.cli.hardware_entry import read_hardware
from sageLLM.runtime.cli.main import app
from sageLLM.runtime.kernels.cpu.compiler import find_compiler
from sageLLM.runtime.kernels.cpu.library import Library
from sageLLM.runtime.registry.plugins import load_registry

STEPS = (decodes(1, 40), decodes(3, 20), prompt(24), prompt(7, 16), prompt(9, 0, 2, 20))


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(cpu.KERNELS, Path(cpu.__file__).parent, find_compiler())


def test_the_loops_do_the_work_that_they_report(library: Library) -> None:
    kernels = LimitKernels(library, threads=1, seconds=0.0)
    rates = kernels.multiply()
    assert {*rates} <= {*LOOPS} and all(rate > 1e8 for rate in rates.values())
    if "avx512_bf16" in rates:
        assert rates["avx512_bf16"] > 1.3 * rates["avx512_f32"], "pairs of products count twice"
    data, target = torch.arange(2**16, dtype=torch.int32).view(torch.uint8), torch.zeros(2**18, dtype=torch.uint8)
    assert kernels.copy(data, target) > 0
    assert torch.equal(data, target)
    assert kernels.write(target) > 0
    assert torch.unique(target).tolist() == [1], "every byte is written"
    ones, total = torch.ones(2**16), torch.zeros(2)
    for streams in (1, 4):
        function = library.helper("limits.cpp", "limit_read", "f32")
        pointers = (ctypes.c_void_p * 2)(ones.data_ptr(), total.data_ptr())
        function(pointers, (ctypes.c_int64 * 4)(ones.nbytes, 2, streams, 3), None)
        assert total.tolist() == [3 * 2**16 / 2 / 16] * 2, "a total is one of 16 lanes, of all lines and passes"


def test_the_disk_is_read_after_it_was_written(tmp_path: Path) -> None:
    assert disk_read_rate(tmp_path, 2**20) > 0
    assert [*tmp_path.iterdir()] == []


def test_kernels_of_a_step_have_families_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MODELS", {"qwen3": sweep.MODELS["qwen3"] | {"num_hidden_layers": 1}})
    model = SweepModel(load_registry(()), "qwen3", "bfloat16")
    found = {work: dict(model.rows(work, 1)) for work in STEPS}
    attention = [next(family for family in rows if family.endswith("_attn")) for rows in found.values()]
    assert attention == ["decode_attn", "decode_attn", "prefill_attn", "prefill_attn", "mixed_attn"]
    for rows in found.values():
        assert {"gemm", "default", "linear", "linear_silu_mul", "qk_norm_rope_kv_store"} <= {*rows}
        assert all(row.seconds > 0 and row.num_bytes > 0 for row in rows.values())
    heads, width = 16, 128
    assert found[STEPS[1]]["decode_attn"].flops == 4 * heads * width * 3 * 20
    assert found[STEPS[3]]["prefill_attn"].flops == 4 * heads * width * (7 * 16 + 7 * 8 // 2)
    mixed = found[STEPS[4]]["mixed_attn"]
    assert (mixed.sequences, mixed.context) == (2, 20)
    assert (mixed.flops, mixed.prompt_flops) == (4 * heads * width * 40, 4 * heads * width * 45)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks measure in this process, a few small steps and pieces of memory."""
    monkeypatch.setattr(limits, "DRAM_BYTES", 2**20)
    monkeypatch.setattr(limits, "L3_BYTES", 2**18)
    monkeypatch.setattr(limits, "DISK_BYTES", 2**20)
    monkeypatch.setattr(sweep, "MODELS", {"llama": sweep.MODELS["llama"] | {"num_hidden_layers": 2}})
    monkeypatch.setattr(sweep.measure_kernels, "__defaults__", (3, STEPS))

    def run(request: HardwareRequest, num_ranks: int, threads: int, parts: list[str]) -> list[RankResult]:
        spec = RankSpec(0, 1, 1, None, [part for part in parts if part != "link"], runs=1, seconds=0.0)
        reduced = [(4, 2e-6), (4096, 4e-6), (2**20, 3e-4)] if "link" in parts else []
        found = measure_rank(spec)
        return [RankResult(found.limits, found.kernels, reduced)] * num_ranks

    monkeypatch.setattr(hardware, "_run_ranks", run)


@pytest.mark.usefixtures("short")
def test_the_entry_is_a_hardware_file(tmp_path: Path) -> None:
    found = measure_hardware(HardwareRequest("mine"))
    path = tmp_path / "mine.yaml"
    path.write_text(as_yaml(found, "A test."))
    read = read_hardware(path)
    assert read.name == "mine"
    assert read.peak_flops == pytest.approx(found.hardware.peak_flops, rel=1e-3)
    assert read.memory_bandwidth == pytest.approx(found.limits.read, rel=1e-3)
    assert {"gemm", "default", "linear", "decode_attn", "prefill_attn", "mixed_attn"} <= {*read.efficiency}
    for family, one in found.hardware.efficiency.items():
        assert read.efficiency[family].combined(1.0, 2.0) == pytest.approx(one.combined(1.0, 2.0), rel=0.02), family
    assert read.link.bandwidth == pytest.approx(2**20 / 3e-4, rel=0.5), "the link is fitted to the all-reduces"
    assert read.disk_link is not None and read.disk_link.bandwidth > 0


@pytest.mark.usefixtures("short")
def test_the_command_writes_the_entry_and_prints_the_limits(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    done = CliRunner().invoke(app, ["bench", "hardware", "--out", str(path), "--json"])
    assert done.exit_code == 0, done.stderr
    assert {"read_gb_s", "copy_gb_s", "link_us", "launch_us"} <= {*json.loads(done.stdout)}
    assert read_hardware(path).name == "measured"
    done = CliRunner().invoke(app, ["bench", "hardware", "--dtype", "int8"])
    assert (done.exit_code, done.stderr) == (1, "error: dtype must be one of float32, bfloat16, float16, got int8\n")


def test_ranks_run_as_processes_and_report_their_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    run = hardware._run_ranks
    (first, second) = run(HardwareRequest(seconds=0.0), 2, 1, ["link"])
    assert [size for size, _ in first.all_reduces] == [size for size, _ in second.all_reduces]
    assert all(seconds > 0 for _, seconds in first.all_reduces)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        hardware.SageError, match="a measuring process failed: error: the machine's limits are measured"
    ):
        run(HardwareRequest(seconds=0.0), 1, 1, ["limits"])
