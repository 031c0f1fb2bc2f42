"""Counts of rewrites for `sagellm generate`, which compares them with what the specs expect."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sageLLM.runtime.inspect.expectations import MissedExpectation


def missed_expectations(tree: Path, is_overlay: bool) -> "list[MissedExpectation]":
    """See `sageLLM.runtime.inspect.expectations`, which is imported only if counts are checked."""
    from sageLLM.runtime.inspect import expectations

    return expectations.missed_expectations(tree, is_overlay)
