"""The part of llguidance's `LLMatcher` that is used. The package is imported with the first grammar only."""

from __future__ import annotations

from typing import Protocol


class Matcher(Protocol):
    """The state of a grammar after some tokens. Errors do not raise: they put it into a state that it never leaves."""

    def consume_tokens(self, tokens: list[int]) -> bool: ...

    def is_stopped(self) -> bool:
        """Whether only the end of the answer may follow; also true after an error."""

    def is_error(self) -> bool: ...

    def get_error(self) -> str: ...
