"""Exceptions for a user's mistakes, with the location, the rule and the remedy, and for failures of the engine."""

from __future__ import annotations

from sageLLM.runtime.core.printable import printable

MAX_MESSAGE_LEN = 10_000


class SageError(ValueError):
    """Base class: an input of the user is invalid.

    Messages quote names and values of checkpoints and requests, so they are made safe to print here, in one place.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, MAX_MESSAGE_LEN))


class CheckpointError(SageError):
    """A checkpoint folder, or a file in it, cannot be read."""


class PluginError(SageError):
    """A plugin folder cannot be imported, or redefines a name of the package or of another plugin."""


class TokenizerError(SageError):
    """The tokenizer files of a checkpoint are missing or damaged, or a text cannot be encoded."""


class ChatTemplateError(SageError):
    """A chat template cannot be compiled, rejects the messages, or exceeds one of its limits."""


class RequestError(SageError):
    """One request is invalid; the others continue. `param` names the invalid field, as in OpenAI's error body."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineError(RuntimeError):
    """A step failed for a reason that belongs to no single request; all requests in it have ended."""


class SchedulerStalledError(RuntimeError):
    """A step would compute nothing although requests wait and nothing is pending: a defect of the scheduler."""


class SamplingParamsError(RequestError):
    """A sampling parameter has the wrong type or is out of range."""


class PromptError(RequestError):
    """A prompt is empty, too long for the model, or contains an invalid token id."""
