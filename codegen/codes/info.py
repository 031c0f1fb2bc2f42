"""The title and the explanation of a diagnostic code."""

from typing import NamedTuple


class CodeInfo(NamedTuple):
    """The title of a code (a noun phrase) and its explanation: the rule, the reason and the remedy."""

    title: str
    explanation: str
