"""Bounds the queue: counts the requests and prompt tokens that wait for their first token, and refuses more.

Everything here runs in the event loop, without an await between a check and its count, so counts are exact.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from sageLLM.runtime.server.errors import ApiError

CHARS_PER_TOKEN = 4
"""Estimates the tokens of a text that is not tokenised yet; the ticket is corrected afterwards."""
RATE_SECONDS = 10.0
"""Time constant of the measured drain rate."""
MAX_RETRY_SECONDS = 120


@dataclass(slots=True)
class Ticket:
    """The requests and prompt tokens that one HTTP request occupies in the queue."""

    num_requests: int
    num_tokens: int = 0
    is_waiting: bool = True


class Admission:
    """The queue in front of the engine. `max_tokens` is set when the engine is built."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.num_requests = 0
        self.num_tokens = 0
        self._rate = 0.0
        self._rate_time = time.monotonic()
        self.is_draining = False

    def enter(self) -> Ticket:
        """A place in the queue, before anything is read. Raises ApiError 429 if there is none, 503 while draining."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", reason="draining")
        if self.is_full:
            raise self.refusal_of_full()
        self.num_requests += 1
        return Ticket(1)

    @property
    def is_full(self) -> bool:
        """Whether there is no place for one more request."""
        return self.num_requests >= self.max_requests

    def refusal_of_full(self) -> ApiError:
        """The refusal of one more request."""
        return self._refusal("requests", f"{self.num_requests} requests are queued, of at most {self.max_requests}")

    def claim(self, ticket: Ticket, num_requests: int, num_tokens: int) -> None:
        """Sets what the ticket occupies. Raises ApiError 429 if that is too much; the ticket then keeps its place.

        A single request is admitted to an empty queue whatever its length.
        """
        if num_requests > self.max_requests:
            text = f"the request has {num_requests} answers, and at most {self.max_requests} can be queued"
            raise ApiError(400, f"{text}; send several requests")
        others = self.num_requests - ticket.num_requests
        if others + num_requests > self.max_requests:
            raise self._refusal("requests", f"{others} requests are queued, of at most {self.max_requests}")
        other_tokens = self.num_tokens - ticket.num_tokens
        if other_tokens and other_tokens + num_tokens > self.max_tokens:
            text = f"{other_tokens} prompt tokens are queued, of at most {self.max_tokens}"
            raise self._refusal("tokens", text)
        self.correct(ticket, num_requests, num_tokens)

    def correct(self, ticket: Ticket, num_requests: int, num_tokens: int) -> None:
        """Replaces the estimate of an admitted ticket by the true numbers."""
        if ticket.is_waiting:
            self.num_requests += num_requests - ticket.num_requests
            self.num_tokens += num_tokens - ticket.num_tokens
            ticket.num_requests, ticket.num_tokens = num_requests, num_tokens

    def start(self, ticket: Ticket) -> None:
        """The first token is there: the ticket leaves the queue, and counts for the drain rate."""
        if ticket.is_waiting:
            self._count_drained(ticket.num_requests)
            self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Gives the place back, whatever has become of the request. May be called again."""
        if ticket.is_waiting:
            ticket.is_waiting = False
            self.num_requests -= ticket.num_requests
            self.num_tokens -= ticket.num_tokens

    @property
    def retry_after(self) -> int:
        """Seconds in which the queue drains at the measured rate."""
        rate = self._rate * math.exp(-(time.monotonic() - self._rate_time) / RATE_SECONDS) / RATE_SECONDS
        if rate <= 0:
            return 1
        return max(1, min(MAX_RETRY_SECONDS, math.ceil(self.num_requests / rate)))

    def _count_drained(self, count: int) -> None:
        now = time.monotonic()
        self._rate = self._rate * math.exp(-(now - self._rate_time) / RATE_SECONDS) + count
        self._rate_time = now

    def _refusal(self, reason: str, text: str) -> ApiError:
        seconds = self.retry_after
        message = f"the server is at its limit: {text}; retry in {seconds} s"
        return ApiError(429, message, headers={"Retry-After": str(seconds)}, reason=reason)
