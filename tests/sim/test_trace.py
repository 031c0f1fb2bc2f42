"""Traces: what the readers take, what they refuse and how they say so, and what is drawn by a seed."""

from pathlib import Path

import numpy as np
import pytest

from sageLLM.runtime.sim.trace import (
    BadRowError,
    Lengths,
    SkippedRows,
    TraceError,
    TraceRequest,
    at_rate,
    poisson_arrivals,
    read_trace,
    synthetic,
)


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_azure_times_count_from_the_first_arrival(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
    )
    first, second = read_trace(written(tmp_path, "a.csv", text))
    assert first == TraceRequest(0.0, 374, 44)
    assert (second.num_prompt_tokens, second.num_output_tokens) == (396, 109)
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-6)


def test_mooncake_hashes_become_shared_prefixes(tmp_path: Path) -> None:
    text = (
        '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
        '{"timestamp": 3500, "input_length": 700, "output_length": 2, "hash_ids": [7, 12]}\n'
    )
    first, second = read_trace(written(tmp_path, "m.jsonl", text))
    assert (first.arrival_s, second.arrival_s) == (0.0, 2.5)
    a, b = first.prompt_token_ids(0), second.prompt_token_ids(1)
    assert (len(a), len(b)) == (1100, 700)
    assert a[:512] == b[:512] and a[512:700] != b[512:]


def test_a_serving_timeline_is_a_trace(tmp_path: Path) -> None:
    text = '{"arrival_time": 17.5, "input_toks": 10, "output_toks": 3}\n'
    assert read_trace(written(tmp_path, "t.jsonl", text)) == [TraceRequest(0.0, 10, 3)]


def test_prompts_without_hashes_share_no_prefix() -> None:
    request = TraceRequest(0.0, 40, 1)
    assert request.prompt_token_ids(3)[:16] != request.prompt_token_ids(4)[:16]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "", "x.txt: the suffix of a trace must be one of .csv, .jsonl, .json"),
        ("x.csv", "a,b\n", "x.csv:1: expected the columns ContextTokens, GeneratedTokens, TIMESTAMP"),
        ("x.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "x.csv: expected at least one valid request, got none"),
        (
            "x.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,0,4\n",
            "x.csv:2: expected at least one prompt and one output token, got 0 and 4",
        ),
        ("x.jsonl", '\n{"timestamp": 1}\n', "x.jsonl:2: the key 'input_length' is missing"),
        ("x.jsonl", "[1]\n", "x.jsonl:1: "),
        (
            "x.json",
            "[[2, 3], [1]]",
            "x.json: expected [prompt tokens, output tokens] in entry 1: not enough values to unpack",
        ),
        ("x.json", "{}", "x.json: expected a list of [prompt tokens, output tokens], got dict"),
        ("x.json", "[", "x.json: expected a list of [prompt tokens, output tokens]: Expecting value"),
        ("x.jsonl", '{"arrival_time": NaN, "input_toks": 1, "output_toks": 1}', "x.jsonl:1: expected a finite time"),
        ("x.jsonl", '{"arrival_time": 1, "input_toks": Infinity, "output_toks": 1}', "x.jsonl:1: "),
    ],
)
def test_a_bad_trace_is_an_error_with_file_and_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(written(tmp_path, name, text))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD_AND_BAD = {
    "x.csv": f"{HEADER}2023-11-16 18:15:46.68,0,4\n2023-11-16 18:15:47.68,9,4\n\xff,1,1\n2023-11-16 18:15:49.68,7,1\n",
    "x.jsonl": """{"timestamp": 1, "input_length": 0, "output_length": 4}
        {"timestamp": 1000, "input_length": 9, "output_length": 4}
        {"timestamp":
        {"timestamp": 3000, "input_length": 7, "output_length": 1}""",
    "x.json": "[[0, 4], [9, 4], [1], [7, 1]]",
}


@pytest.mark.parametrize("name", GOOD_AND_BAD)
def test_bad_rows_are_skipped_and_counted_on_request(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, GOOD_AND_BAD[name])
    skipped = SkippedRows()
    trace = read_trace(path, skipped)
    assert [(one.num_prompt_tokens, one.num_output_tokens) for one in trace] == [(9, 4), (7, 1)]
    assert trace[0].arrival_s == 0.0, "times count from the first valid row"
    assert skipped.num == 2
    with pytest.raises(BadRowError) as caught:
        read_trace(path)
    assert str(caught.value) == skipped.first
    assert "expected at least one prompt and one output token, got 0 and 4" in skipped.first


def test_a_trace_without_any_valid_row_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "x.json", "[[0, 4], [1]]")
    with pytest.raises(TraceError, match="expected at least one valid request, got none"):
        read_trace(path, SkippedRows())


def test_poisson_arrivals_have_the_rate_and_repeat_by_seed() -> None:
    times = poisson_arrivals(20_000, rate=4.0, seed=1)
    assert times[0] == 0.0 and times == sorted(times)
    gaps = np.diff(times)
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.03) and np.std(gaps) == pytest.approx(0.25, rel=0.03)
    assert times == poisson_arrivals(20_000, rate=4.0, seed=1) != poisson_arrivals(20_000, rate=4.0, seed=2)
    assert at_rate([TraceRequest(9.0, 1, 1)] * 3, 4.0, 1)[2].arrival_s == times[2]
    for rate in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"the rate must be more than 0 requests per second, got {rate}"):
            poisson_arrivals(2, rate=rate, seed=0)


@pytest.mark.parametrize(("p50", "p90"), [(100.0, 50.0), (0.0, 1.0), (float("nan"), 2.0), (1.0, float("inf"))])
def test_lengths_without_a_distribution_are_refused(p50: float, p90: float) -> None:
    with pytest.raises(ValueError, match=f"a p90 of at least the median, got {p50} and {p90}"):
        Lengths(p50, p90, 10)


def test_random_lengths_have_the_requested_percentiles() -> None:
    trace = synthetic(20_000, 1.0, Lengths(1730, 5696, 8192), Lengths(415, 834, 8192), seed=3)
    prompts = [one.num_prompt_tokens for one in trace]
    assert np.percentile(prompts, 50) == pytest.approx(1730, rel=0.03)
    assert np.percentile(prompts, 90) == pytest.approx(5696, rel=0.03)
    assert max(prompts) == 8192 and min(prompts) >= 1
