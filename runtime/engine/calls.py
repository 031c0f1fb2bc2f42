"""Shares one engine among callers: threads, nested and abandoned streams, asyncio."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from sageLLM.runtime.engine.engine import Engine
from sageLLM.runtime.engine.interrupts import Interrupts, held_interrupts
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.sequences import RequestGroup
from sageLLM.runtime.errors import EngineError, RequestError

ABORTED = "aborted by the caller"
MAX_QUEUED = 1024


class Call:
    """The requests of one call and the outputs that its caller has not taken yet.

    Outputs are cumulative. A caller that is more than `max_queued` outputs late gets only the newest one of each
    request, so a stream that nobody reads occupies bounded memory. `notify` is called after new outputs, without a
    lock, in the thread that ran the step.
    """

    def __init__(
        self,
        groups: Sequence[RequestGroup],
        *,
        notify: Callable[[], None] | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self.groups = groups
        self.open_ids = {group.request_id for group in groups}
        self.error: EngineError | None = None
        self.notify = notify
        self._lock = threading.RLock()  # reentrant: the garbage collector can close a stream at any point
        self._outputs: deque[RequestOutput] = deque()
        # At least one per request has to stay, so compaction frees a good part of the queue each time.
        self._max_queued = max_queued + (2 * len(groups) if len(groups) > 1 else 0)

    @property
    def is_ready(self) -> bool:
        """Whether the caller need not wait: there is an output or an error, or all requests have ended."""
        return bool(self._outputs) or self.is_ended

    @property
    def is_ended(self) -> bool:
        """Whether the engine has no more outputs for this call."""
        return self.error is not None or not self.open_ids

    def push(self, output: RequestOutput) -> None:
        """Adds an output; those of a closed call are dropped."""
        with self._lock:
            if output.request_id not in self.open_ids:
                return
            self._outputs.append(output)
            if len(self._outputs) > self._max_queued:
                self._outputs = deque({queued.request_id: queued for queued in self._outputs}.values())
            if output.finished:
                self.open_ids.discard(output.request_id)

    def take(self) -> RequestOutput | None:
        """The next output, or None at the end. Raises the call's error once its outputs are taken."""
        with self._lock:
            if self._outputs:
                return self._outputs.popleft()
        if self.error is not None:
            raise self.error
        return None

    def close(self) -> list[str]:
        """Drops all outputs; returns the ids of the requests that have not ended."""
        with self._lock:
            ids = list(self.open_ids)
            self.open_ids.clear()
            self._outputs.clear()
            return ids


class SharedEngine:
    """Lets any number of calls use one engine at the same time.

    The first caller that has to wait for an output runs a step, for the requests of all calls; the others wait for the
    end of that step. One step runs at a time, and outputs go to the call that owns the request. Requests are submitted
    and aborted between steps: both are queued in an inbox, so that neither waits for a step, and a stream can be closed
    in any thread, also by the garbage collector.
    """

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine
        # The default lock is reentrant, for the same reason as that of a call.
        self._changed = threading.Condition()
        self._is_busy = False
        self._num_exclusive = 0
        self._calls: dict[str, Call] = {}
        self._streamed: set[str] = set()
        self._inbox: deque[Callable[[], None]] = deque()

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "only a generative model has an engine"
        return self._engine

    def outputs(self, groups: Sequence[RequestGroup]) -> Generator[RequestOutput, None, None]:
        """Queues the requests and yields their outputs; aborts those that are not finished when it is closed."""
        call = Call(groups)
        try:
            self.open(call)
            while (output := self._next(call)) is not None:
                yield output
        finally:
            self.close(call)

    def open(self, call: Call) -> None:
        """Queues the call's requests for the next step. RequestError if an id is that of a live request."""
        with self._changed:
            for group in call.groups:
                if group.request_id in self._calls:
                    call.open_ids.clear()
                    raise RequestError(f"request_id must differ from live ones, got {group.request_id!r}", "request_id")
            self._calls.update({group.request_id: call for group in call.groups})
        self._inbox.extend(partial(self._submit, call, group) for group in call.groups)

    def close(self, call: Call) -> None:
        """Aborts the call's requests that have not ended; they leave the engine before its next step."""
        if ids := call.close():
            self._inbox.extend(partial(self._remove, request_id) for request_id in ids)
            self._drain()

    def abort(self, request_id: str) -> None:
        """Ends one request; its call gets the output so far, with the reason. An unknown id is ignored."""
        self._inbox.append(partial(self._end, request_id))
        self._drain()

    def is_live(self, request_id: str) -> bool:
        return request_id in self._calls

    def advance(self, is_done: Callable[[], bool], interrupts: Interrupts) -> None:
        """Runs one step, or waits while another thread does; returns early once `is_done`.

        Ctrl-C interrupts the wait, and is held back during the step.
        """
        with self._changed:
            while (self._is_busy or self._num_exclusive) and not is_done():
                self._changed.wait()
        if is_done():
            return
        interrupts.hold()
        if self._take_turn():
            try:
                self._step()
            finally:
                self._end_turn()
                self._drain()
        interrupts.release()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps steps from running in the block, for other work on the model; waits for those that are running."""
        with held_interrupts():
            with self._changed:
                self._num_exclusive += 1  # takes precedence over a caller that runs one step after another
                while self._is_busy:
                    self._changed.wait()
                self._num_exclusive -= 1
                self._is_busy = True
            try:
                if self._engine is not None:
                    self._engine.wait()
                yield
            finally:
                self._end_turn()
                self._drain()

    # --- turns ---

    def _next(self, call: Call) -> RequestOutput | None:
        if not call.is_ready:
            with held_interrupts() as interrupts:
                interrupts.release()
                while not call.is_ready:
                    self.advance(lambda: call.is_ready, interrupts)
        return call.take()

    def _take_turn(self) -> bool:
        with self._changed:
            if self._is_busy:
                return False
            self._is_busy = True
            return True

    def _end_turn(self) -> None:
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()

    def _drain(self) -> None:
        """Empties the inbox, unless a step is running: its thread does so at the end of the step."""
        while self._inbox:
            with held_interrupts():
                if not self._take_turn():
                    return
                try:
                    self._apply_inbox()
                finally:
                    self._end_turn()

    # --- in a turn ---

    def _step(self) -> None:
        self._apply_inbox()
        if not self.engine.has_work:
            # Only a direct call of the engine's step or abort can have taken outputs away from their calls.
            self._fail_all(EngineError("the requests of this call were removed by a direct use of LLM.engine"))
            return
        try:
            outputs = self.engine.step(only_finished=not self._streamed)
        except BaseException as error:
            self._fail_all(self.engine.reset(error))
            if not isinstance(error, Exception):
                raise
            return
        self._deliver(outputs)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        calls = {}
        for output in outputs:
            call = self._calls.get(output.request_id)
            if call is None:
                continue
            if output.finished:
                self._forget(output.request_id)
            call.push(output)
            calls[id(call)] = call
        for call in calls.values():
            self._notify(call)

    def _fail_all(self, error: EngineError) -> None:
        """Ends all calls with an error."""
        calls = {id(call): call for call in self._calls.values()}
        self._calls.clear()
        self._streamed.clear()
        for call in calls.values():
            call.open_ids.clear()
            call.error = error
            self._notify(call)

    def _notify(self, call: Call) -> None:
        if call.notify is None:
            return
        try:
            call.notify()
        except RuntimeError:  # the call's event loop is closed, so its outputs cannot be taken
            self._inbox.extend(partial(self._remove, request_id) for request_id in call.close())

    def _apply_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _submit(self, call: Call, group: RequestGroup) -> None:
        if group.request_id not in call.open_ids:  # closed before its first step
            self._forget(group.request_id)
            return
        if group.is_streamed:
            self._streamed.add(group.request_id)
        try:
            self.engine.submit(group)
        except Exception as error:
            self._deliver([self.engine.refuse(group, error)])

    def _remove(self, request_id: str) -> None:
        self._forget(request_id)
        self.engine.abort(request_id, ABORTED)

    def _forget(self, request_id: str) -> None:
        self._calls.pop(request_id, None)
        self._streamed.discard(request_id)

    def _end(self, request_id: str) -> None:
        output = self.engine.abort(request_id, ABORTED)
        if output is not None:
            self._deliver([output])
