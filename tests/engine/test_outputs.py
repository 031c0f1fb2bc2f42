"""Latencies derived from a request's recorded times."""

from __future__ import annotations

from sageLLM.runtime.engine.outputs import CompletionOutput, RequestMetrics


def test_ttft_and_tpot_follow_from_the_recorded_times():
    metrics = RequestMetrics(arrival_time=10.0)
    for now in (10.5, 10.7):
        metrics.record_first_token(now)
    metrics.num_generated_tokens = 3
    metrics.record_finish(11.5)
    assert metrics.ttft == 0.5
    assert metrics.tpot == 0.5


def test_figures_are_absent_before_they_are_known():
    metrics = RequestMetrics(arrival_time=10.0)
    assert (metrics.ttft, metrics.tpot) == (None, None)
    metrics.record_first_token(11.0)
    metrics.num_generated_tokens = 1
    metrics.record_finish(11.0)
    assert (metrics.ttft, metrics.tpot) == (1.0, None)


def test_an_answer_is_finished_with_its_reason():
    assert not CompletionOutput(0, "", ()).finished
    assert CompletionOutput(0, "", (), finish_reason="length").finished
