"""Tests of the comparison with other engines: load, figures, checks, resume, published table; without the engines."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT / "benchmarks" / "peers"), str(ROOT / "benchmarks")]
MODULES = ("correctness", "load", "publish", "run", "shapes", "table", "variants", "workloads")


@pytest.fixture(scope="module")
def peers() -> Iterator[SimpleNamespace]:
    """The modules of the benchmark, which import each other by their plain names."""
    others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}  # modules of other tests
    sys.path[:0] = FOLDERS
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path[:] = [one for one in sys.path if one not in FOLDERS]
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(others)


def test_work_of_a_child_is_own_and_that_of_others_is_foreign(peers: SimpleNamespace) -> None:
    start = peers.load.LoadTimes.now()
    busy = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert peers.load.LoadTimes.now().own - start.own >= 0.25, "of a child that has ended"
    later = peers.load.LoadTimes(start.wall + 2.0, start.machine + 3.0, start.own + 1.5)
    assert later.foreign_since(start) == pytest.approx(0.75)
    assert peers.load.memory_mb("VmRSS") > 20 and peers.load.memory_mb("VmHWM") >= peers.load.memory_mb("VmRSS")


def test_waiting_for_a_quiet_machine_ends(peers: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([0.0, 0.9, 0.9, 1.0, 1.0, 1.01])

    def now() -> Any:
        return peers.load.LoadTimes(time.perf_counter(), next(loads), 0.0)

    monkeypatch.setattr(peers.load.LoadTimes, "now", staticmethod(now))
    assert peers.load.wait_until_quiet(limit_s=5.0, span_s=0.1)
    assert [*loads] == [], "the third pause is the first quiet one"
    assert not peers.load.wait_until_quiet(limit_s=0.0)


def test_workloads_measure_every_engine_alike(peers: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tuple[int, int]]] = []
    workloads = peers.workloads

    def complete(asks: Sequence[Any]) -> list[list[int]]:
        asked.append([(len(one.prompt), one.num_new) for one in asks])
        return [[1] * one.num_new for one in asks]

    def seconds(complete: Any, asks: Sequence[Any]) -> float:
        return 0.001 * sum(len(answer) for answer in complete(asks))

    with pytest.raises(AssertionError, match=r"expected \[3\] tokens, got \[1\]"):
        workloads.seconds(lambda asks: [[1]], [workloads.ask(random.Random(0), 4, 3)])
    monkeypatch.setattr(workloads, "seconds", seconds)
    samples = workloads.WORKLOADS["decode"].samples(complete, 1, time.perf_counter() + 60)
    assert [round(one.value) for one in samples] == [1000] * 4, "the first token does not count"
    assert asked[1:3] == [[(128, 1)], [(128, 65)]]
    late = workloads.WORKLOADS["serve_16"].samples(complete, 1, time.perf_counter() - 1)
    assert len(late) == 1, "one sample is measured when the time is over"
    assert asked[-1] == [(len(one.prompt), one.num_new) for one in workloads.requests(16)]
    assert workloads.prefill(512)(complete, random.Random(0)) == 512 / 0.001
    workloads.WORKLOADS["decode_8192"].samples(complete, 1, time.perf_counter() + 60)
    assert asked[-5:] == [[(8192, 4)], [(8192, 1)], [(8192, 513)], [(8192, 1)], [(8192, 513)]]


def test_the_longest_workload_fits_and_has_a_row(peers: SimpleNamespace) -> None:
    workloads, table = peers.workloads, peers.table
    assert {*workloads.STANDARD} < {*workloads.WORKLOADS} <= {*table.UNITS}
    longest = max(one.warm_up for one in workloads.WORKLOADS.values())
    assert longest + workloads.num_decoded(longest) < peers.shapes.MAX_LEN


def test_other_benchmarks_import_the_shapes_by_the_folder_above() -> None:
    code = f"import sys; sys.path[:0] = [{FOLDERS[1]!r}]; import peers.shapes"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_checkpoint_for_shorter_sequences_is_kept(peers: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "135m"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text('{"max_position_embeddings": 2048, "vocab_size": 7}')
    assert peers.shapes.checkpoint("135m", tmp_path) == folder
    config = json.loads((folder / "config.json").read_text())
    assert config == {"max_position_embeddings": peers.shapes.MAX_LEN, "vocab_size": 7}


def test_the_check_finds_wrong_tokens_and_accepts_ties(peers: SimpleNamespace, tmp_path: Path) -> None:
    sizes = {**peers.shapes.SHAPES["135m"].sizes, **peers.shapes.CHECK_SIZES, "num_hidden_layers": 2}
    folder = peers.shapes._made(
        peers.shapes.Shape("Llama", {**sizes, "hidden_size": 144, "intermediate_size": 96}), tmp_path
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([peers.correctness.check_prompt()])
    right = model.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=0)[0, 32:].tolist()
    found = peers.correctness.gaps(tmp_path, {"right": right, "wrong": [*right[:20], 7, *right[21:]], "same": [5] * 40})
    assert found["right"] == {"distinct": len({*right}), "best": 40, "tokens": 40, "largest_gap": 0.0}
    many = {"distinct": peers.correctness.MIN_DISTINCT}  # a model as small as this one repeats itself
    assert peers.correctness.problem_of(found["right"] | many, 0.0) is None
    problem = peers.correctness.problem_of(found["wrong"] | many, 0.3)
    assert problem.endswith("deviations below the best, expected at most 0.3")
    assert peers.correctness.problem_of(found["same"], 9.0) == "1 distinct tokens of 40, expected 28"


def process(value: float, foreign: float = 0.0, **more: Any) -> dict[str, Any]:
    samples = {name: [[value, foreign], [value + 2, 0.0]] for name in ("decode", "prefill_1024", "serve_16")}
    return {"startup_s": 2.0, "resident_mb": 500, "peak_mb": 600, "samples": samples, "waited": True, **more}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Two rounds of three engines, of which one is wrong and one sample was disturbed; one of 8-bit weights."""
    files = {
        "limits.first": {"read_gb_s": 50.0, "gflop_s": {"avx2_f32": 200.0, "avx512_bf16": 400.0}},
        "limits.last-1": {"read_gb_s": 54.0, "gflop_s": {"avx2_f32": 210.0, "avx512_bf16": 390.0}},
        "check.135m.ours": {"problem": None},
        "check.135m.vllm": {"problem": None},
        "check.135m.llama.cpp": {"problem": "a token is 3 deviations below the best"},
        "135m.ours.native.0": process(100.0),
        "135m.ours.native.1": process(100.0, 0.5),
        "135m.vllm.native.0": process(50.0, startup_s=8.0),
        "135m.vllm.native.1": process(50.0),
        "135m.llama.cpp.native.0": process(900.0),
        "0.6b.ours.avx2.0": process(10.0),
        **{f"check.135m.{name}": {"problem": None} for name in ("ours-q8_0", "llama.cpp-q8_0")},
        "135m.ours-q8_0.native.0": process(30.0),
        "135m.llama.cpp-q8_0.native.0": process(62.0),
        "135m.openvino.native.0": {"error": "Traceback\nValueError: no"},
    }
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    return tmp_path


MACHINE = {"date": "2026-01-02", "cpu": "A processor", "threads": 2, "cores": 2}


def test_the_table_has_medians_ratios_and_fractions(peers: SimpleNamespace, state: Path) -> None:
    result = peers.table.result_of(state, MACHINE)
    decode = result["rows"]["135m"]["native"]["decode"]
    assert decode["ours"] | {"fraction_of_limit": 0} == {
        "median": 102.0, "least": 100.0, "most": 102.0, "samples": 3, "dropped": 1, "fraction_of_limit": 0,
    }  # fmt: skip
    weights = 2 * 134.5e6 + 2 * 160 * 2 * 30 * 192
    assert decode["ours"]["fraction_of_limit"] == pytest.approx(102 * weights / 54e9, rel=0.01)
    assert result["failures"] == {"135m.openvino.native.0": "Traceback\nValueError: no"}
    text = peers.table.text_of(result)
    assert "reads 54.0 GB/s; GFLOP/s: avx2_f32 210, avx512_bf16 400." in text
    (row,) = [line for line in text.splitlines() if line.startswith("| decode") and "102" in line]
    assert "| void |" in row and "2.00 (vllm)" in row, "an engine with wrong tokens is left out"
    assert row.endswith("| 2.00 (vllm) | 0.49 (llama.cpp-q8_0) |"), "classes are compared on their own"
    assert "llama.cpp is void: a token is 3 deviations below the best" in text
    assert "| 0.6b, avx2 |" in text
    cold = next(line for line in text.partition("| 135m, native")[2].splitlines() if "cold" in line)
    assert "0.25 (vllm)" in cold


def test_a_prompt_is_bound_by_arithmetic_and_serving_by_both(peers: SimpleNamespace) -> None:
    table, work, ours = peers.table, peers.shapes.work_of("0.6b"), peers.variants.VARIANTS["ours"]
    limits = {"read_gb_s": 50.0, "gflop_s": {"avx512_bf16": 400.0, "avx2_f32": 200.0}}
    prefill = table.bound_of("prefill_1024", work, ours, "native", limits)
    assert prefill == pytest.approx(1024 * 400e9 / work.prompt_flops(1024))
    assert table.bound_of("prefill_1024", work, ours, "avx2", limits) == pytest.approx(prefill / 2)
    served = table.bound_of("serve_16", work, ours, "native", limits)
    asks = peers.workloads.requests(16)
    prompts_s = sum(work.prompt_flops(len(one.prompt)) for one in asks) / 400e9
    assert served < sum(one.num_new for one in asks) / prompts_s
    assert work.layer_weights + work.head_weights == pytest.approx(0.596e9, rel=0.01)
    quantised = peers.variants.VARIANTS["llama.cpp-q8_0"]
    decodes = [table.bound_of("decode", work, one, "native", limits) for one in (ours, quantised)]
    assert 1.6 < decodes[1] / decodes[0] < 1.9
    longer = table.bound_of("decode_8192", work, ours, "native", limits)
    assert decodes[0] / longer == pytest.approx(work.decode_bytes("bf16", 8448) / work.decode_bytes("bf16", 160))


def test_a_result_is_published_unless_the_machine_was_busy(
    peers: SimpleNamespace, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = peers.table.result_of(state, MACHINE)
    for is_chinese in (False, True):
        block = peers.publish.readme_block(result, is_chinese=is_chinese)
        assert "102 tok/s, 2.00x vllm | `make bench-peers` |" in block and "2026-01-02" in block
    assert "| bf16 | 102 |" in peers.publish.formats_block(result)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{peers.publish.BEGIN}old\n{peers.publish.END}after\n")
    peers.publish.replace_block(page, "new\n")
    assert page.read_text() == f"before\n{peers.publish.BEGIN}new\n{peers.publish.END}after\n"
    (state / "135m.ours.native.0.json").write_text(json.dumps(process(1.0, waited=False)))
    busy = peers.table.result_of(state, MACHINE)
    assert "not for comparison" in peers.table.text_of(busy)
    assert busy["rows"]["135m"]["native"]["decode"]["ours"]["dropped"] == 0, "nothing is dropped, as all is disturbed"
    out = tmp_path / "busy.out"
    out.write_text(json.dumps(busy))
    with pytest.raises(SystemExit, match="was measured with --no-wait"):
        peers.publish.main(out)


def test_a_run_continues_where_it_was(peers: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def worker(self: Any, variant: Any, isa: str, task: dict[str, Any]) -> dict[str, Any]:
        started.append(f"{task['task']} {isa} {task.get('round', '')}")
        return {"error": "lost"} if len(started) == 2 else {"startup_s": 1.0, "samples": {}}

    monkeypatch.setattr(peers.run.Runner, "_worker", worker)
    monkeypatch.setattr(peers.run, "checkpoint", lambda shape, cache: tmp_path)
    options = SimpleNamespace(
        state=tmp_path / "state", variants="ours", shapes="135m", workloads="decode", isas="avx2", rounds=2,
        minutes=1.0, threads=1, cache=tmp_path, envs=tmp_path, no_wait=True, drop_caches=False, retry=False,
    )  # fmt: skip
    monkeypatch.setattr(peers.run.Runner, "_limits", lambda self, name: None)
    peers.run.Runner(options).measure()
    assert started == ["measure native 0", "measure avx2 0", "measure native 1", "measure avx2 1"]
    peers.run.Runner(options).measure()
    assert len(started) == 4, "nothing is repeated"
    options.retry = True
    peers.run.Runner(options).measure()
    assert started[4:] == ["measure avx2 0"], "but for the process that failed"
    options.minutes = 0.0
    options.state = tmp_path / "later"
    peers.run.Runner(options).measure()
    assert len(started) == 5, "no process starts after the time"
