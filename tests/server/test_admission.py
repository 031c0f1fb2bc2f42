"""The queue of the server: exact counts, refusals, and the time to retry."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import pytest
from servers import ScriptedChannel, running

from sageLLM.runtime.server import admission as module
from sageLLM.runtime.server.admission import Admission
from sageLLM.runtime.server.errors import ApiError


def test_requests_are_counted_until_their_first_token() -> None:
    queue = Admission(max_requests=2, max_tokens=100)
    first, second = queue.enter(), queue.enter()
    with pytest.raises(ApiError, match="2 requests are queued, of at most 2") as refused:
        queue.enter()
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
    queue.start(first)
    third = queue.enter()
    for ticket in (second, third, first):
        queue.leave(ticket)
        queue.leave(ticket)
    assert (queue.num_requests, queue.num_tokens) == (0, 0)


def test_tokens_are_counted_and_corrected() -> None:
    queue = Admission(max_requests=10, max_tokens=100)
    first, second = queue.enter(), queue.enter()
    queue.claim(first, 1, 500)  # longer than the limit, but the queue is empty
    with pytest.raises(ApiError, match="500 prompt tokens are queued, of at most 100"):
        queue.claim(second, 1, 1)
    queue.correct(first, 1, 60)
    queue.claim(second, 1, 40)
    assert queue.num_tokens == 100
    queue.leave(first)
    assert queue.num_tokens == 40


def test_answers_count_as_requests() -> None:
    queue = Admission(max_requests=4, max_tokens=100)
    first, second = queue.enter(), queue.enter()
    queue.claim(first, 3, 1)
    with pytest.raises(ApiError, match="3 requests are queued"):
        queue.claim(second, 2, 1)
    with pytest.raises(ApiError, match="5 answers, and at most 4") as never:
        queue.claim(second, 5, 1)
    assert never.value.status == 400, "retrying would not help"


def test_retry_after_is_the_time_in_which_the_queue_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    queue = Admission(max_requests=1000, max_tokens=1000)
    tickets = [queue.enter() for _ in range(600)]
    for ticket in tickets[:400]:  # four per second
        now += 0.25
        queue.start(ticket)
    assert queue.retry_after == pytest.approx(50, rel=0.05)


def test_no_new_requests_while_draining() -> None:
    queue = Admission(max_requests=4, max_tokens=100)
    queue.is_draining = True
    with pytest.raises(ApiError) as refused:
        queue.enter()
    assert refused.value.status == 503


def test_of_many_simultaneous_posts_exactly_the_limit_is_admitted() -> None:
    """The engine computes nothing, so the numbers do not depend on timing."""
    channel = ScriptedChannel()
    limit, num_posts = 5, 40
    with running(lambda: channel, max_num_queued_reqs=limit) as server:
        barrier = threading.Barrier(num_posts)
        seconds = []

        def post(index: int) -> int:
            barrier.wait()
            start = time.perf_counter()
            response = server.post("/v1/completions", {"prompt": [index + 1], "max_tokens": 1})
            if response.status_code == 429:
                seconds.append(time.perf_counter() - start)
                assert int(response.headers["retry-after"]) >= 1
            return response.status_code

        with concurrent.futures.ThreadPoolExecutor(num_posts) as pool:
            posts = [pool.submit(post, index) for index in range(num_posts)]
            for _ in range(limit):
                assert channel.arrived.acquire(timeout=30)
            while len(seconds) < num_posts - limit:
                time.sleep(0.01)
            assert server.service.admission.num_requests == limit
            for name in list(channel.submitted):
                channel.emit_tokens(name, [7], "length")
            codes = [one.result() for one in posts]
        assert (codes.count(200), codes.count(429)) == (limit, num_posts - limit)
        assert server.service.admission.num_requests == 0
        page = server.get("/metrics").text
        assert (
            f'admission_rejections_total{{engine="0",model_name="tiny",reason="requests"}} {num_posts - limit}.0'
            in page
        )
