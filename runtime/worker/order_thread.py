"""Thread that runs submitted calls one after another, and the results of calls that may still run."""

import atexit
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from typing import Any, Generic, TypeVar, cast

import torch

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Pending(Generic[Result]):
    """The result of a call that may still run: a future without callbacks, which is set and read with one lock."""

    __slots__ = ("_error", "_is_running", "_result")

    def __init__(self) -> None:
        self._is_running = Lock()
        self._is_running.acquire()
        self._result: Result | None = None
        self._error: BaseException | None = None

    def run(self, function: Callable[[Argument], Result], argument: Argument) -> None:
        """Makes the call. Errors are kept for `result`."""
        try:
            self._result = function(argument)
        except BaseException as error:
            self._error = error
        self._is_running.release()

    def wait(self) -> None:
        with self._is_running:
            pass

    def result(self) -> Result:
        """Waits for the end of the call; returns its result, or raises its error."""
        with self._is_running:
            if self._error is not None:
                raise self._error
            return cast(Result, self._result)


class OrderThread(Generic[Argument, Result]):
    """Runs calls in the order of `submit`, in inference mode. The thread ends with `close`, or when this is garbage.

    A ThreadPoolExecutor takes longer between two calls than a steady decode step takes in Python.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        # A daemon, because the interpreter joins other threads before it runs `_end_threads`.
        self._thread = Thread(target=_run_calls, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        _open_threads[self._thread] = self._calls
        self._finalizer = weakref.finalize(self, self._calls.put, None)

    def submit(self, function: Callable[[Argument], Result], argument: Argument) -> Pending[Result]:
        pending: Pending[Result] = Pending()
        self._calls.put((pending.run, function, argument))
        return pending

    @property
    def is_idle(self) -> bool:
        """Whether no call waits for its turn."""
        return self._calls.empty()

    def close(self) -> None:
        """Ends the thread after the calls submitted before."""
        self._finalizer()
        if self._thread is not current_thread():
            self._thread.join()


_open_threads: weakref.WeakKeyDictionary[Thread, SimpleQueue[Any]] = weakref.WeakKeyDictionary()


@atexit.register
def _end_threads() -> None:
    """Waits for the calls that are running: their memory is freed when the process exits."""
    for thread, calls in list(_open_threads.items()):
        calls.put(None)
        thread.join()


@torch.inference_mode()
def _run_calls(calls: "SimpleQueue[Any]") -> None:
    while (call := calls.get()) is not None:
        run, function, argument = call
        run(function, argument)
        del call, run, function, argument  # or this thread would keep their owner alive while it waits
