"""`AsyncLLM`: the engine of an `LLM` for asyncio, with vLLM's method names."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from sageLLM.runtime.engine.calls import Call, SharedEngine
from sageLLM.runtime.engine.embedding import EmbeddingOutput
from sageLLM.runtime.engine.interrupts import held_interrupts
from sageLLM.runtime.engine.llm import LLM
from sageLLM.runtime.engine.outputs import RequestOutput
from sageLLM.runtime.engine.prompts import Prompt
from sageLLM.runtime.engine.sequences import RequestTraits
from sageLLM.runtime.sampling.sampling_params import SamplingParams
from sageLLM.runtime.text.chat_messages import Conversation


class AsyncLLM:
    """An `LLM` for coroutines: each request is an asynchronous generator of its outputs so far.

        llm = AsyncLLM("path/to/checkpoint")
        async for output in llm.generate("def main(", SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    Steps run in a thread, which exists only while requests are running, so the event loop is never blocked. A consumer
    that is late gets only the newest output. Closing the generator, or cancelling the task that reads it, aborts the
    request. `LLM(...)` and this class take the same arguments; an `LLM` can be passed instead of a folder, and then
    both serve requests with one engine.
    """

    def __init__(self, model: str | Path | LLM, **options: Any) -> None:
        if isinstance(model, LLM) and options:
            raise TypeError(f"options must be passed to the LLM itself, got {', '.join(options)}")
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._driver = Driver(self.llm.shared)
        self._mailbox: _Mailbox | None = None

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the output of one request whenever it has new tokens. Raises RequestError for an invalid request.

        A lower `priority` is served first, `deadline` is in seconds from now, and `tenant` is the unit of fair sharing;
        the policy of the scheduler decides which of them has an effect.
        """
        traits = RequestTraits(priority, deadline, tenant)
        group = await asyncio.to_thread(self.llm.prepare_one, prompt, params, request_id, traits)
        mailbox, arrived = self._mailbox_of_loop(), asyncio.Event()
        call = Call([group], notify=lambda: mailbox.notify(arrived), max_queued=1)
        shared = self.llm.shared
        try:
            shared.open(call)
            self._driver.add(call)
            while True:
                while not call.is_ready:
                    await arrived.wait()
                    arrived.clear()
                output = call.take()
                if output is None:
                    return
                yield output
        finally:
            shared.close(call)

    async def chat(self, messages: Conversation, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
        """`LLM.chat` in a thread, for one conversation and with its options.

        A cancelled task does not wait for the answer, which is completed nevertheless.
        """
        return await asyncio.to_thread(lambda: self.llm.chat(messages, params, **options))

    async def embed(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[EmbeddingOutput]:
        """`LLM.embed` in a thread, with its options."""
        return await asyncio.to_thread(self.llm.embed, prompts, **options)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its generator yields the output so far, with `finish_reason` "abort". See `LLM.abort`."""
        self.llm.abort(request_id)

    def _mailbox_of_loop(self) -> _Mailbox:
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = _Mailbox(loop)
        return self._mailbox


class Driver:
    """A thread that runs steps while calls of coroutines have requests, and ends when none has."""

    def __init__(self, shared: SharedEngine) -> None:
        self._shared = shared
        self._lock = threading.Lock()
        self._calls: deque[Call] = deque()
        self._is_running = False

    def add(self, call: Call) -> None:
        with self._lock:
            self._calls.append(call)
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="sagellm-steps").start()

    def _run(self) -> None:
        try:
            while (call := self._oldest()) is not None:
                self._complete(call)
        except BaseException:
            with self._lock:
                self._is_running = False
            raise

    def _complete(self, call: Call) -> None:
        with held_interrupts() as interrupts:  # does nothing here, as this is never the main thread
            while not call.is_ended:
                self._shared.advance(lambda: call.is_ended, interrupts)

    def _oldest(self) -> Call | None:
        """The oldest call that has not ended; None ends the thread."""
        with self._lock:
            while self._calls and self._calls[0].is_ended:
                self._calls.popleft()
            if self._calls:
                return self._calls[0]
            self._is_running = False  # under the lock: a call that is added from now on starts a new thread
            return None


class _Mailbox:
    """Sets events of one event loop from other threads, with one call into the loop for all events of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: deque[asyncio.Event] = deque()
        self._is_scheduled = False

    def notify(self, event: asyncio.Event) -> None:
        """Raises RuntimeError if the loop is closed."""
        self._events.append(event)
        if not self._is_scheduled or self.loop.is_closed():
            self._is_scheduled = True
            self.loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._is_scheduled = False  # before the loop: an event that is added from now on schedules the next flush
        while self._events:
            self._events.popleft().set()
