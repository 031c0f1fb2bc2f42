"""The exceptions that a user of the engine can meet, each one naming the place and the remedy."""

from __future__ import annotations


class SageError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


class CheckpointError(SageError):
    """A checkpoint folder, or a file in it, cannot be read."""


class PluginError(SageError):
    """A plugin folder cannot be imported, or hides a name of the package or of another plugin."""


class TokenizerError(SageError):
    """The tokenizer files of a checkpoint are missing or damaged, or a text cannot be encoded."""


class ChatTemplateError(SageError):
    """A chat template cannot be compiled, refuses the messages, or breaks one of its limits."""


class RequestError(SageError):
    """One request is refused; the others go on. `param` names the field at fault, as OpenAI's error body does."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class SamplingParamsError(RequestError):
    """A sampling parameter has the wrong type or lies outside its range."""


class PromptError(RequestError):
    """A prompt is empty, too long for the model, or holds an id that is no token."""
