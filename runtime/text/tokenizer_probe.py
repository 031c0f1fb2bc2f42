"""Tries a tokenizer.json in a child process with hard limits, before this process loads it.

The `tokenizers` library aborts the process when memory runs out, panics on damaged tables, and runs any regular
expression and any replacement of the file. The child finds crashes, and measures how the work grows with the text,
which bounds the texts that `Tokenizer.encode` accepts.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers

from sageLLM.runtime.errors import SageError, TokenizerError
from sageLLM.runtime.files import open_regular_file, read_regular_file

MAX_TOKENIZER_BYTES = 256 * 2**20
PROBE_SECONDS = 60.0
"""The deadline of a probe."""
MAX_CPU_SECONDS = 20
"""The limit of a probe's processor time. A vocabulary of 250,000 tokens takes about a second."""
MAX_PROBE_BYTES = 2**30
"""The address space of a probe, besides 32 times the size of the file: a vocabulary of 24 MB takes 150 MB."""
_WORKER = Path(__file__).with_name("tokenizer_probe_worker.py")
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
_REMEDY = "use another tokenizer.json, or pass prompts as token ids with skip_tokenizer=True"


@contextlib.contextmanager
def library_errors(label: str) -> Iterator[None]:
    """Raises TokenizerError for errors of the library, as `caller_error` describes."""
    try:
        yield
    except BaseException as error:
        raise caller_error(error, label) from None


def caller_error(error: BaseException, label: str) -> BaseException:
    """The error to raise for one of the library: TokenizerError for its bare Exceptions, and for its panics, which
    derive from BaseException.

    TypeError, OverflowError and UnicodeEncodeError are about the argument of the call, and stay as they are.
    """
    if type(error).__name__ == "PanicException":  # the class has no public name
        return TokenizerError(f"{label}: the tokenizer library panics ({error})")
    if isinstance(error, Exception) and not isinstance(
        error, TypeError | OverflowError | UnicodeEncodeError | SageError
    ):
        return TokenizerError(f"{label}: {error}")
    return error


class TokenizerBounds(NamedTuple):
    """Characters of the longest token, and of the longest text that is tokenised in bounded time."""

    longest_token: int
    max_text_len: int


class TokenizerProbe:
    """A probe that runs, with the content of the file; `result` waits for it. Close it if the result is not used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = read_regular_file(path, MAX_TOKENIZER_BYTES, TokenizerError)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # The child imports the library of this process, whatever sys.path has become since the start.
        library = str(Path(tokenizers.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), library])
        max_bytes = MAX_PROBE_BYTES + 32 * len(self.data)
        command = [sys.executable, "-P", "-X", "utf8", str(_WORKER), str(max_bytes), str(MAX_CPU_SECONDS)]
        with open_regular_file(path, MAX_TOKENIZER_BYTES, TokenizerError) as file:
            self._process = subprocess.Popen(
                command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )

    def result(self) -> TokenizerBounds:
        """Raises TokenizerError if the library rejects the file, or the probe exceeds a limit or crashes."""
        try:
            output, _ = self._process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired:
            raise self._error(f"takes more than {PROBE_SECONDS:.0f} s for short texts") from None
        finally:
            self.close()
        if not output.endswith(b"\n"):
            raise self._error("crashes the tokenizer library, or requires too much memory or time for short texts")
        reply = json.loads(output)
        if "invalid" in reply:
            raise TokenizerError(f"{self.path} is not a tokenizer: {reply['invalid']}")
        if "refused" in reply:
            raise self._error(reply["refused"])
        return TokenizerBounds(reply["longest"], reply["max_text_len"])

    def close(self) -> None:
        """Ends the child process."""
        self._process.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()

    def _error(self, reason: str) -> TokenizerError:
        return TokenizerError(f"{self.path} {reason}; {_REMEDY}")
