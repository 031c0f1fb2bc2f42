"""Table of rewrite rules on one graph: tried, matched, fired, and the savings."""

from collections.abc import Iterable, Iterator, Mapping

from sageLLM.runtime.core.ir.dims import Dim
from sageLLM.runtime.core.ir.nodes import ExecutionNode
from sageLLM.runtime.core.ir.op_node import OpNode
from sageLLM.runtime.core.passes.base import PassReport
from sageLLM.runtime.core.rewrite.stats import RuleStats

HEAD: tuple[str, ...] = ("rule", "tried", "matched", "fired", "ms", "nodes", "kernels", "flops", "bytes")


def rule_table(reports: Iterable[PassReport], step: Mapping[str, Dim]) -> str:
    """A row for each rule that was tried, with the change in nodes, kernels, operations and bytes moved in one step.

    The reasons of near misses and refused matches follow the table.
    """
    reports = list(reports)
    rows = [HEAD]
    for report in reports:
        rows += [_row(name, stats, step) for name, stats in report.rules.items() if stats.tried]
        rows.append((f"{report.name}: {report.nodes_before} -> {report.nodes_after} nodes", "", "", str(report.fired),
                     f"{1e3 * report.seconds:.2f}", "", "", "", ""))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([*lines, *_reasons(reports)])


def _row(name: str, stats: RuleStats, step: Mapping[str, Dim]) -> tuple[str, ...]:
    old = [node for change in stats.changes for node in change.old]
    new = [node for change in stats.changes for node in change.new]
    gained = [f"{b - a:+,}" if a != b else "0" for a, b in zip(work(old, step), work(new, step), strict=True)]
    return (f"  {name}", str(stats.tried), str(stats.matched), str(stats.fired), f"{1e3 * stats.seconds:.2f}", *gained)


def _reasons(reports: list[PassReport]) -> Iterator[str]:
    for report in reports:
        for name, stats in report.rules.items():
            yield from (f"{name} {line}" for line in stats.explain_near_misses())


def work(nodes: Iterable[ExecutionNode], step: Mapping[str, Dim]) -> tuple[int, int, int, int]:
    """Nodes, kernels (nodes but views), operations and bytes moved; ValueError for a size missing in `step`."""
    nodes = list(nodes)
    kernels = [node for node in nodes if isinstance(node, OpNode) and not node.is_view]
    flops = sum(_number(node.flops(step), node) for node in kernels)
    return len(nodes), len(kernels), flops, sum(_number(node.bytes_moved(step), node) for node in kernels)


def _number(amount: Dim, node: ExecutionNode) -> int:
    if not isinstance(amount, int):
        raise ValueError(f"{node.node_id}: the step does not bind {amount}")
    return amount
