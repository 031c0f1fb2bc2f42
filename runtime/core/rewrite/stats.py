"""Statistics of rewrite rules: how often each one fired, and the reasons why it did not fire elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.rewrite.rules import NearMiss


class Change(NamedTuple):
    """One rewrite: the nodes that were replaced and those that replaced them."""

    old: tuple[ExecutionNode, ...]
    new: tuple[ExecutionNode, ...]


@dataclass(slots=True)
class RuleStats:
    """The changes of a rule with a pattern of `num_nodes` nodes, in order, and its near misses by anchor id.

    `seconds` counts matching and replacing.
    """

    num_nodes: int
    changes: list[Change] = field(default_factory=list)
    near_misses: dict[str, NearMiss] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def fired(self) -> int:
        return len(self.changes)

    @property
    def tried(self) -> int:
        """The number of anchors at which the rule fired or nearly matched."""
        return self.fired + len(self.near_misses)

    @property
    def matched(self) -> int:
        """The number of anchors at which all nodes of the pattern matched."""
        return self.fired + sum(miss.num_matched == self.num_nodes for miss in self.near_misses.values())

    @property
    def reasons(self) -> Counter[str]:
        """The reasons of the near misses with their counts."""
        return Counter(miss.reason for miss in self.near_misses.values())

    def explain_near_misses(self) -> Iterator[str]:
        """A line for each reason, the most frequent first, with the first anchor as an example."""
        examples = {(miss.num_matched, miss.reason): node_id for node_id, miss in reversed(self.near_misses.items())}
        counts = Counter((miss.num_matched, miss.reason) for miss in self.near_misses.values())
        for (num_matched, reason), count in counts.most_common():
            where = f"at {examples[num_matched, reason]}" + (f" and {count - 1} more" if count > 1 else "")
            yield f"matched {num_matched} of {self.num_nodes} nodes {where}: {reason}"

    def __str__(self) -> str:
        text = f"fired {self.fired} of {self.tried}"
        if self.near_misses:
            reason, count = self.reasons.most_common(1)[0]
            text += f"; {len(self.near_misses)} near misses, {count} of them: {reason}"
        return text
