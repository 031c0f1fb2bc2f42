"""Connections to the ranks of a target: pieces are sent without waiting for the answers to those before them.

The receiver has a low priority, so on a busy machine each of its answers takes a while; one at a time would limit the
number of pieces in a second.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from sageLLM.runtime.transport.channel import answer_challenge
from sageLLM.runtime.transport.frames import FrameError, Reply, receive_header
from sageLLM.runtime.transport.sockets import acknowledged_bytes, connect, is_idle, limit_waits, shut

SECONDS = 60.0
"""A connection without progress for so long is closed."""
HANDSHAKE_SECONDS = 5.0
STALL_SECONDS = 1.0
"""A connection without progress for so long is not used again after one of its pieces was cancelled."""


class Answers:
    """The answers of a target's ranks to the parts of a piece.

    `on_end` gets the reason of the first failure, or None, when all parts have been sent and all answers are there.
    """

    def __init__(self, on_end: Callable[[str | None], None]) -> None:
        self._on_end, self._lock = on_end, threading.Lock()
        self._num_missing = 1  # the sender
        self._reason: str | None = None

    def expect(self) -> None:
        """One more part is about to be sent."""
        with self._lock:
            self._num_missing += 1

    def take(self, reason: str | None = None) -> None:
        """An answer to a part has arrived, or the sender has sent all of them."""
        with self._lock:
            self._reason = self._reason or reason
            self._num_missing -= 1
            is_last = not self._num_missing
        if is_last:
            self._on_end(self._reason)


class Link:
    """A connection to one rank. A thread takes the answers, in the order of the pieces.

    An answer has SECONDS from the end of its piece, or from the last progress of the other end. While a piece is being
    sent only the sender has a limit, as layers that are computed one after another take any time together.
    """

    def __init__(self, address: str, key: bytes, is_wanted: Callable[[], bool]) -> None:
        """Connects while it `is_wanted`. Raises OSError, and AuthenticationError if the other end has another key."""
        self.stream = connect(address, SECONDS, is_wanted)
        try:
            limit_waits(self.stream, HANDSHAKE_SECONDS)
            with Connection(os.dup(self.stream.fileno())) as connection:
                answer_challenge(connection, key)
            limit_waits(self.stream, SECONDS)
        except BaseException:
            self.stream.close()
            raise
        self._lock, self._is_open = threading.Lock(), True
        self._is_sending, self._progress_at = False, time.monotonic()
        self._seen_at, self._seen = time.monotonic(), 0
        self._unanswered: deque[Answers] = deque()
        self._num_answers = self._last_progress = 0
        self._incoming = self.stream.dup()  # each thread closes its own descriptor
        threading.Thread(target=self._run, name="sagellm-kv-answers", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether pieces can be sent: the receiver has not gone, nor closed the connection as it was idle for long."""
        return self._is_open and (bool(self._unanswered) or is_idle(self.stream))

    @property
    def progress(self) -> int:
        """Grows while the other end receives and answers."""
        found = acknowledged_bytes(self._incoming) + self._num_answers
        if found != self._seen:
            self._seen, self._seen_at = found, time.monotonic()
        return found

    @property
    def is_stalled(self) -> bool:
        """Whether an answer is due and the other end has received nothing for a while, by the looks at `progress`.

        The kernel doubles its pauses between attempts then, so a new connection notices earlier that a link is back.
        """
        _ = self.progress
        return bool(self._unanswered) and time.monotonic() - self._seen_at >= STALL_SECONDS

    def expect(self, answers: Answers) -> None:
        """The next piece is about to be sent. Raises OSError after the end of the connection."""
        with self._lock:
            if not self._is_open:
                raise ConnectionResetError("the other end has closed the connection")
            answers.expect()
            self._unanswered.append(answers)
            self._is_sending = True

    def end_piece(self) -> None:
        """The piece is sent; its answer is due."""
        with self._lock:
            self._is_sending, self._progress_at = False, time.monotonic()

    def stop(self) -> None:
        """Ends the sending, also one that waits. The receiver drops an incomplete piece, and answers those before."""
        with self._lock:
            self._is_open = False
        shut(self.stream, socket.SHUT_WR)

    def drop(self) -> None:
        """As `stop`, in the thread that sends, which does not use the link again."""
        self.stop()
        self.stream.close()

    def close(self) -> None:
        """Ends the connection; pieces without an answer have failed."""
        shut(self.stream)
        self.stream.close()

    def _run(self) -> None:
        try:
            while True:
                while not wait([self._incoming], self._seconds_left()):
                    pass
                reply, _ = receive_header(self._incoming)
                if not isinstance(reply, Reply) or not self._unanswered:
                    raise FrameError("unexpected answer")
                self._num_answers += 1
                self._unanswered.popleft().take(reply.reason)
        except (FrameError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
        with self._lock:
            self._is_open = False
        shut(self._incoming)
        while self._unanswered:
            self._unanswered.popleft().take(reason)
        self._incoming.close()

    def _seconds_left(self) -> float:
        """The time for the next answer. Raises TimeoutError if it is over, and lets no further piece be sent then."""
        with self._lock:
            if (progress := self.progress) != self._last_progress:
                self._last_progress, self._progress_at = progress, time.monotonic()
            left = SECONDS if self._is_sending else self._progress_at + SECONDS - time.monotonic()
            self._is_open = self._is_open and left > 0
        if left <= 0:
            raise TimeoutError(f"no answer within {SECONDS:g} s")
        return left
