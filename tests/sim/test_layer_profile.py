"""Step durations from measured op tables: lookups computed by hand, and a run of a real engine."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sageLLM.runtime.scheduler.pd_scheduler import PDSchedulerConfig
from sageLLM.runtime.scheduler.step_cost import PromptChunk, StepWork
from sageLLM.runtime.sim.layer_profile import Grid, LayerProfileCost
from sageLLM.runtime.sim.metrics import Timeline
from sageLLM.runtime.sim.modes import Setup, make_cluster
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


def profile(folder: Path) -> Path:
    layers = ["embedding", "final_layernorm", "layernorm", "mlp"]
    dense = [f"{layer},{n},{(i + 1) * n}" for i, layer in enumerate(layers) for n in (1, 1001)]
    sequence = [f"{layer},{n},{time * n}" for layer, time in (("lm_head", 100), ("sampler", 1)) for n in (1, 101)]
    attention = [
        f"{c},{k},{n},{d},{c + 0.1 * k + n * d + (5 if c and n else 0)}"
        for c in (0, 16, 32)
        for k in ((0, 16) if c else (0,))
        for n in (0, 1, 8)
        for d in ((16, 1024) if n else (0,))
        if c or n
    ]
    folder.mkdir(exist_ok=True)
    (folder / "profile_dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]))
    (folder / "profile_per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *sequence]))
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
    (folder / "profile_attention.csv").write_text("\n".join([header, *attention]))
    return folder


@pytest.mark.parametrize(
    ("work", "attention"),
    [
        (StepWork((), 4, 4 * 100), 400.0),
        (StepWork([PromptChunk(10, 20)]), 21.0),
        (StepWork([PromptChunk(10, 20), PromptChunk(0, 16)], 4, 4 * 100), 21.0 + 400 + 5 + 16),
    ],
)
def test_a_step_adds_its_ops(tmp_path: Path, work: StepWork, attention: float) -> None:
    """Per token 1 us of embedding, 2 of the last norm, and per layer two norms of 3 and an MLP of 4 us."""
    tokens, sequences = work.num_tokens, work.num_decodes + len(work.prefill)
    expected = 3 * tokens + 2 * ((3 + 3 + 4) * tokens + attention) + 101 * sequences
    assert LayerProfileCost(profile(tmp_path), 2).step_s(work) == pytest.approx(expected / 1e6)
    slow = LayerProfileCost(profile(tmp_path), 2, request_s=0.5)
    assert slow.step_s(work) == pytest.approx(expected / 1e6 + 0.5 * sequences)
    assert slow.step_s(StepWork()) == 0.0


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "profile_dense.csv",
            "layer,tokens,time_us\nmlp,1,1\nmlp,2,1",
            ": expected rows for embedding, final_layernorm, layernorm, got none",
        ),
        ("profile_dense.csv", "layer,tokens,time_us\nmlp,one,1", ":2: could not convert string to float: 'one'"),
        ("profile_attention.csv", "c,k,n,d,t\n0,0,1,x,1", ":2: could not convert string to float: 'x'"),
        ("profile_attention.csv", "c,k,n,d,t\n0,0,1,16,1", ": expected at least two grid points, got 1"),
        (
            "profile_attention.csv",
            "c,k,n,d,t\n0,0,1,16,1\n0,0,2,16,1\n0,0,1,32,1",
            ": expected a full grid, got none at the point (2.0, 32.0)",
        ),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    (profile(tmp_path) / file).write_text(text)
    with pytest.raises(TraceError) as caught:
        LayerProfileCost(tmp_path, 1)
    assert str(caught.value) == f"{tmp_path / file}{message}"


@pytest.fixture(scope="module")
def measured(data: Path) -> list[dict[str, Any]]:
    """300 requests through vLLM 0.19 on an RTX PRO 6000, in order of arrival."""
    rows = [json.loads(line) for line in (data / RUN / "requests.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: row["arrival_time"])


@pytest.fixture(scope="module")
def simulated(data: Path) -> list[Timeline]:
    cost = LayerProfileCost(data / RUN, num_layers=32, request_s=VLLM_SCHEDULER_S)
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
