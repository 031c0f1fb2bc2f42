"""Step durations from measured op tables: lookups computed by hand, and a run of a real engine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork
from sageLLM.runtime.sim.layer_profile import LayerProfileCost, ProfiledModel, tables_of
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.modes import Setup, make_cluster
from sageLLM.runtime.sim.overheads import AddedCost, HostTime
from sageLLM.runtime.sim.profile_tables import Grid, read_rows
from sageLLM.runtime.sim.simulator import Simulation
from sageLLM.runtime.sim.trace import TraceError, read_trace

RUN = "serving_timelines/RTXPRO6000_Llama-3.1-8B"
VLLM_SCHEDULER_S = 1840e-6 / 256
"""The time of vLLM 0.19's scheduler per running request, from a separate measurement: 1,840 us at 256 requests."""


def test_a_grid_is_linear_between_and_beyond_its_points() -> None:
    grid = Grid([[0.0, 10.0], [1.0, 2.0, 4.0]], np.array([[0.0, 1.0, 3.0], [10.0, 11.0, 13.0]]))
    assert grid.at(0, 1) == 0 and grid.at(10, 4) == 13
    assert grid.at(5, 3) == pytest.approx(7.0)
    assert grid.at(20, 6) == pytest.approx(25.0)
    assert grid.at(-50, 1) == 0, "no time is negative"


PER_TOKEN = {
    "embedding": 1,
    "final_layernorm": 2,
    "layernorm": 3,
    "qkv_proj": 4,
    "o_proj": 5,
    "gate_up_proj": 6,
    "act_fn": 7,
    "down_proj": 8,
}
"""Microseconds per token of the test profile's dense layers."""
MODEL = ProfiledModel(2, has_rope=False)
MIXTURE = ProfiledModel(2, num_moe_layers=1, num_experts=8, experts_per_token=2, has_rope=False)


def profile(folder: Path, *missing: str) -> Path:
    """A profile with simple times, without the `missing` rows."""
    dense = [f"{layer},{n},{us * n}" for layer, us in PER_TOKEN.items() if layer not in missing for n in (1, 1001)]
    head = (("lm_head", 100), ("sampler", 1))
    sequence = [f"{layer},{n},{time * n}" for layer, time in head if layer not in missing for n in (1, 101)]
    attention = [
        f"{c},{k},{n},{d},{c + 0.1 * k + n * d + (5 if c and n else 0)}"
        for c in (0, 16, 32)
        for k in ((0, 16) if c else (0,))
        for n in (0, 1, 8)
        for d in ((16, 1024) if n else (0,))
        if c or n
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]))
    (folder / "per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *sequence]))
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
    (folder / "attention.csv").write_text("\n".join([header, *attention]))
    return folder


def add_experts(folder: Path) -> None:
    """A table of experts: 10 us per activated expert and 1 us per token."""
    points = [(t, e) for t in (1, 4, 1024) for e in (2, 4, 8) if e <= 2 * t]
    lines = [f"{t},{e},{10 * e + t}" for t, e in points]
    (folder / "moe.csv").write_text("\n".join(["tokens,activated_experts,time_us", *lines]))


WORKS = [
    (StepWork((), 4, 4 * 100), 400.0),
    (StepWork([PromptChunk(10, 20)]), 21.0),
    (StepWork([PromptChunk(10, 20), PromptChunk(0, 16)], 4, 4 * 100), 21.0 + 400 + 5 + 16),
]


@pytest.mark.parametrize(("work", "attention"), WORKS)
def test_a_step_adds_its_ops(tmp_path: Path, work: StepWork, attention: float) -> None:
    """Per token 1 us of embedding and 2 of the last norm; per layer two norms of 3, projections of 9, an MLP of 21."""
    tokens, sequences = work.num_tokens, work.num_decodes + len(work.prefill)
    expected = 3 * tokens + 2 * ((3 + 3 + 9 + 21) * tokens + attention) + 101 * sequences
    cost = LayerProfileCost(profile(tmp_path), MODEL)
    assert cost.step_s(work) == pytest.approx(expected / 1e6)
    linked = LayerProfileCost(tmp_path, MODEL, lambda work: 0.25)
    assert linked.step_s(work) == pytest.approx(expected / 1e6 + 0.25)
    assert linked.step_s(StepWork()) == 0.0
    slow = AddedCost(cost, [HostTime(1.0, 0.5)])
    assert slow.step_s(work) == pytest.approx(expected / 1e6 + 1.0 + 0.5 * sequences)
    assert slow.step_s(StepWork()) == 0.0


@pytest.mark.parametrize(("work", "attention"), WORKS)
def test_experts_replace_the_mlp_of_their_layers(tmp_path: Path, work: StepWork, attention: float) -> None:
    add_experts(profile(tmp_path))
    tokens, sequences = work.num_tokens, work.num_decodes + len(work.prefill)
    selected = 8 * (1 - 0.75**tokens)
    experts = 10 * selected + tokens
    expected = 3 * tokens + 2 * ((3 + 3 + 9) * tokens + attention) + 21 * tokens + experts + 101 * sequences
    assert LayerProfileCost(tmp_path, MIXTURE).step_s(work) == pytest.approx(expected / 1e6)


def test_a_worker_with_a_share_of_the_experts(tmp_path: Path) -> None:
    """Half of the experts, selected by the tokens of both workers."""
    add_experts(profile(tmp_path))
    work = StepWork((), 4, 400)
    whole, half = (LayerProfileCost(tmp_path, MIXTURE, None, size).step_s(work) for size in (1, 2))
    assert whole - half == pytest.approx(10e-6 * (8 * (1 - 0.75**4) - 4 * (1 - 0.75**8)))


def test_rows_with_different_axes_are_interpolated_along_both(tmp_path: Path) -> None:
    add_experts(tmp_path)
    table = read_rows(tmp_path / "moe.csv")
    assert table.at(4, 8) == pytest.approx(84) and table.at(514, 3) == pytest.approx(544)
    assert table.at(4, 16) == pytest.approx(164), "extrapolated"
    (tmp_path / "moe.csv").write_text("t,e,us\n1,8,1\n2,8,1\n2,16,2")
    with pytest.raises(TraceError, match=r"moe.csv: expected at least two rows of at least two points, got 1"):
        read_rows(tmp_path / "moe.csv")


@pytest.mark.parametrize(
    ("missing", "model", "message"),
    [
        (PER_TOKEN, MODEL, f"dense.csv: expected rows for {', '.join(PER_TOKEN)}, got none"),
        (("act_fn", "down_proj"), MODEL, "dense.csv: expected rows for act_fn, down_proj, got none"),
        (("lm_head",), MODEL, "per_sequence.csv: expected rows for lm_head, got none"),
        ((), ProfiledModel(2), "dense.csv: expected rows for rotary_emb, got none"),
        ((), ProfiledModel(2, has_rope=False, has_qk_norm=True), "dense.csv: expected rows for qk_norm, got none"),
        ((), MIXTURE, "moe.csv: expected the times of 8 experts, got no such file"),
    ],
)
def test_tables_that_the_model_requires(
    tmp_path: Path, missing: Sequence[str], model: ProfiledModel, message: str
) -> None:
    profile(tmp_path, *missing)
    with pytest.raises(TraceError) as caught:
        LayerProfileCost(tmp_path, model)
    assert str(caught.value) == str(tmp_path / message)


def test_a_mixture_in_every_layer_needs_no_mlp(tmp_path: Path) -> None:
    profile(tmp_path, "gate_up_proj", "act_fn", "down_proj")
    add_experts(tmp_path)
    all_layers = ProfiledModel(2, num_moe_layers=2, num_experts=8, experts_per_token=2, has_rope=False)
    assert LayerProfileCost(tmp_path, all_layers).step_s(WORKS[0][0]) > 0


def test_the_tables_of_a_degree(tmp_path: Path) -> None:
    two = profile(tmp_path / "bundle" / "tp2")
    assert tables_of(tmp_path / "bundle", 2) == two == tables_of(two, 2)
    with pytest.raises(TraceError, match=r"bundle: expected tables in a folder tp1, got tp2$"):
        tables_of(tmp_path / "bundle", 1)
    with pytest.raises(TraceError, match=r"tp2: expected tables of --tp 1, got those of tp2$"):
        tables_of(two, 1)
    flat = profile(tmp_path / "flat")
    assert tables_of(flat, 1) == flat
    with pytest.raises(TraceError, match=r"flat: expected tables of --tp 2, got those of tp1$"):
        tables_of(flat, 2)
    with pytest.raises(TraceError, match=r"got none$"):
        tables_of(tmp_path / "gone", 1)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("dense.csv", "layer,tokens,time_us\nmlp,one,1", ":2: could not convert string to float: 'one'"),
        ("dense.csv", "layer,time_us\nmlp,1", ":1: expected a column 'tokens'"),
        ("attention.csv", "c,k,n,d,t\n0,0,1,x,1", ":2: could not convert string to float: 'x'"),
        ("attention.csv", "c,k,n,d,t\n0,0,1,16,1", ": expected at least two grid points, got 1"),
        (
            "attention.csv",
            "c,k,n,d,t\n0,0,1,16,1\n0,0,2,16,1\n0,0,1,32,1",
            ": expected a full grid, got none at the point (2.0, 32.0)",
        ),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    (profile(tmp_path) / file).write_text(text)
    with pytest.raises(TraceError) as caught:
        LayerProfileCost(tmp_path, MODEL)
    assert str(caught.value) == f"{tmp_path / file}{message}"


@pytest.fixture(scope="module")
def measured(data: Path) -> list[dict[str, Any]]:
    """300 requests through vLLM 0.19 on an RTX PRO 6000, in order of arrival."""
    rows = [json.loads(line) for line in (data / RUN / "requests.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["arrival_time"])


@pytest.fixture(scope="module")
def simulated(data: Path) -> list[Timeline]:
    tables = LayerProfileCost(data / RUN, ProfiledModel(32))
    cost = AddedCost(tables, [HostTime(request_s=VLLM_SCHEDULER_S)])
    limits = PDSchedulerConfig(max_decode_batch_size=128, max_prefill_tokens=2048)
    setup = Setup(cost, lambda tokens: 0.0, num_prefill=1, num_decode=0, scheduler=limits, enable_prefix_caching=False)
    return Simulation(make_cluster("vllm", setup)).run(read_trace(data / RUN / "requests.jsonl"))


def test_a_real_engine_took_as_long(measured: list[dict[str, Any]], simulated: list[Timeline]) -> None:
    took = max(row["last_token_ts"] for row in measured) - measured[0]["queued_ts"]
    assert max(one.last_token_s or 0 for one in simulated) == pytest.approx(took, rel=0.02)


def test_a_real_engine_gave_tokens_as_fast(measured: list[dict[str, Any]], simulated: list[Timeline]) -> None:
    real = [(row["last_token_ts"] - row["first_token_ts"]) / (row["output_toks"] - 1) for row in measured]
    ours = [one.tpot_s for one in simulated]
    assert np.mean(ours) == pytest.approx(np.mean(real), rel=0.01)
    for p in (50, 90, 99):
        assert np.percentile(ours, p) == pytest.approx(np.percentile(real, p), rel=0.025)


def test_a_real_engine_let_requests_wait_as_long(measured: list[dict[str, Any]], simulated: list[Timeline]) -> None:
    """Waiting times accumulate the error of the throughput, so the median has a larger error."""
    clock = measured[0]["queued_ts"] - measured[0]["arrival_time"]
    real = [row["first_token_ts"] - clock - row["arrival_time"] for row in measured]
    ours = [one.ttft_s for one in simulated]
    assert np.mean(ours) == pytest.approx(np.mean(real), rel=0.03)
    for p, tolerance in ((50, 0.09), (90, 0.03), (99, 0.02)):
        assert np.percentile(ours, p) == pytest.approx(np.percentile(real, p), rel=tolerance)
