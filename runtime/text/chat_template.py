"""Renders chat messages to a prompt with the checkpoint's Jinja template, in a child process with hard limits.

The Jinja sandbox alone lets a template use all memory and time (`'a' * 10**8`, doubling a string in a loop, nested
loops), within single calls that a watchdog in the same process cannot interrupt. So the template runs in a child
process with limited memory and output, which the parent kills at a deadline. The child starts with the first rendering
and is kept. A template comes from the checkpoint or from the program that calls `LLM.chat`; a server must not take one
from a request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from sageLLM.runtime.errors import ChatTemplateError
from sageLLM.runtime.text.chat_messages import ContentForm, Message

T = TypeVar("T")

MAX_TEMPLATE_LEN = 2**20
START_SECONDS = 60.0
_WORKER = Path(__file__).with_name("chat_template_worker.py")
# The variables that Python needs to start, and the time zone. An environment may hold secrets, which a template from a
# checkpoint must not see.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG")


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """Limits of one rendering: characters of output, bytes of the child's address space, seconds."""

    max_chars: int = 1_000_000
    max_bytes: int = 512 * 2**20
    seconds: float = 5.0


class ChatTemplate:
    """One template, ready to render; threads can share it.

    The child process ends with `close`, or at the end of this process, which closes the child's stdin.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str] | None = None, limits: TemplateLimits | None = None
    ) -> None:
        if len(source) > MAX_TEMPLATE_LEN:
            raise ChatTemplateError(
                f"the chat template must have at most {MAX_TEMPLATE_LEN} characters, got {len(source)}"
            )
        self._source = source
        self._special_tokens = dict(special_tokens or {})
        self._limits = limits or TemplateLimits()
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text; encode it with add_special_tokens=False.

        `variables` are further names for the template, such as enable_thinking. All values must be JSON. Raises
        ChatTemplateError if the template fails, rejects the messages, or exceeds a limit.
        """
        values = {
            "documents": None if documents is None else list(documents),
            **self._special_tokens,
            **(variables or {}),
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            line = json.dumps(values, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"the chat messages must be JSON: {error}") from None
        return self._render_line(line)

    def _render_line(self, line: str) -> str:
        return self._text_of(self._with_child(lambda child: child.ask(line, self._limits.seconds)))

    @property
    def content_form(self) -> ContentForm:
        """The contents of messages that the template reads. Raises ChatTemplateError if it cannot be compiled."""
        return self._with_child(lambda child: child.content_form)

    def _with_child(self, use: Callable[[_Child], T]) -> T:
        with self._lock:
            try:
                if self._child is None:
                    self._child = _Child.start(self._source, self._limits)
                return use(self._child)
            except _ChildGoneError as error:
                self._drop_child()
                raise ChatTemplateError(str(error)) from None

    def _text_of(self, reply: Mapping[str, str]) -> str:
        text = reply.get("text")
        if text is None:
            raise ChatTemplateError(_explain(reply, self._limits))
        return text

    def close(self) -> None:
        with self._lock:
            self._drop_child()

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


def _explain(reply: Mapping[str, str], limits: TemplateLimits) -> str:
    match reply.get("error"):
        case "too long":
            return f"the chat template wrote more than {limits.max_chars} characters"
        case "memory":
            return f"the chat template requires more than {limits.max_bytes // 2**20} MiB of memory"
        case "refused":
            return f"the chat template rejects these messages: {reply.get('message')}"
        case _:
            return f"the chat template failed with {reply.get('message')}"


class _ChildGoneError(Exception):
    """The child was killed at its deadline, or exited."""


class _Child:
    """The rendering process and its two pipes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.content_form: ContentForm = "any"

    @classmethod
    def start(cls, source: str, limits: TemplateLimits) -> _Child:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # -P keeps the script's folder off sys.path, where a module of this package could shadow a library.
        child = cls(
            subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        )
        try:
            child._compile(source, limits)
        except BaseException:
            child.stop()
            raise
        return child

    def _compile(self, source: str, limits: TemplateLimits) -> None:
        try:
            self.ask("", START_SECONDS)
        except _ChildGoneError:
            raise _ChildGoneError(
                "the process for chat templates did not start; is jinja2 installed (pip install jinja2)?"
            ) from None
        settings = {"template": source, "max_chars": limits.max_chars, "max_bytes": limits.max_bytes}
        reply = self.ask(json.dumps(settings), limits.seconds)
        if "compiled" not in reply:
            raise ChatTemplateError(_explain(reply, limits))
        self.content_form = cast(ContentForm, reply["compiled"])

    def ask(self, line: str, seconds: float) -> dict[str, str]:
        """Sends a line (none if empty) and returns the reply; kills a child that takes more than `seconds`."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("chat template child: no pipes")
        # A thread kills the child at the deadline, because readline on a pipe cannot time out. The flag distinguishes a
        # late child from one that exited.
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            if line:
                self._process.stdin.write(line + "\n")
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer.endswith("\n"):
            reason = f"took longer than {seconds:g} s" if late.is_set() else "ended its process"
            raise _ChildGoneError(f"the chat template {reason}")
        reply: dict[str, str] = json.loads(answer)
        return reply

    def stop(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue
        self._process.wait()
