"""Errors of the graph library; all derive from IRError, so one except clause catches those of any bad graph."""

from __future__ import annotations

from collections.abc import Sequence


class IRError(ValueError):
    """A graph, a type or a formula breaks a rule."""


class CycleError(IRError):
    """The dependencies form a cycle; `node_ids` names the nodes of one cycle in order."""

    def __init__(self, node_ids: Sequence[str]) -> None:
        self.node_ids = tuple(node_ids)
        super().__init__("dependency cycle: " + " -> ".join([*self.node_ids, self.node_ids[0]]))


class VerifyError(IRError):
    """A graph or a node breaks rules of the IR; `problems` contains one sentence for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class TypeMismatch(IRError):
    """The operands or attributes of an op do not fit its declaration."""


class ParseError(IRError):
    """A text is not in the graph language; `line` and `column` count from 1."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        self.message, self.line, self.column = message, line, column
        super().__init__(f"{line}:{column}: {message}")


class ConfigError(IRError):
    """A model's config file lacks a value or contains an invalid one."""
